"""One whole graph a step: what `torch.compile` must be able to take without a break."""

from typing import Any

import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils import _pytree as pytree

from moeca_fx.runtime.module import TransformedModel


def check_one_graph_a_step(fast: TransformedModel, kwargs: dict[str, Any], batch: int = 2) -> None:
    """Every step of a transformed model is one whole graph for calls of these keywords."""
    graphs = fast._moeca.prepare(fast, (), kwargs).graphs
    assert graphs is not None
    steps = {"full": graphs.full_step} | {rule.name: rule for rule in graphs.rules}
    for name, module in graphs.modules().items():
        step = steps[name]
        held = [torch.zeros(batch, *state.shape, dtype=state.dtype) for state in step.reads]
        arguments = [*pytree.tree_leaves(kwargs), *held, *([torch.ones(16)] if step.clock else [])]
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True), torch.no_grad():
            torch.compile(module, fullgraph=True, backend=counter)(*arguments)
        assert counter.frame_count == 1, f"{name}: {counter.frame_count} graphs"
