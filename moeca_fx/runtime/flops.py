"""FLOPs of full and cached steps: 2 per multiply-add, counted by `torch.utils.flop_counter`.

A full step's work depends on shapes alone. A cached step's is a fixed part plus, for every node that works on selected
rows, a cost a row; both are measured by interpreting the graph on fake tensors with no row and with one row selected.
Multiplied with the step's counters that gives what was executed, routing and scoring included.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from moeca_fx.graph.state import SCALES_WITH, Counter, StateSpec
from moeca_fx.ops import dispatch, rows

_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one batch size.

    Attributes:
        full: of a full step.
        fixed: of a cached step that recomputes nothing.
        each: added by one unit of each counter.
    """

    full: int
    fixed: int
    each: dict[Counter, int]

    def executed(self, full_steps: int, cached_steps: int, counts: dict[Counter, int]) -> int:
        """FLOPs of a run with these steps and counter totals."""
        picked = sum(cost * counts.get(counter, 0) for counter, cost in self.each.items())
        return self.full * full_steps + self.fixed * cached_steps + picked


def measure_step_flops(
    full: fx.GraphModule, cached: fx.GraphModule, states: Sequence[StateSpec], leaves: Sequence[Any], batch: int
) -> StepFlops:
    """Measure both graphs for inputs like `leaves`; nothing is executed."""
    caches = [(state, (batch, *state.shape)) for state in states]
    carried = [item for item in caches if item[0].carried]
    full_total = sum(node_flops(full, leaves, carried).values())
    none = node_flops(cached, leaves, caches, selected=0)
    one = node_flops(cached, leaves, caches, selected=1)
    each: dict[Counter, int] = {}
    for node in cached.graph.nodes:
        if SCALES_WITH in node.meta:
            counter = node.meta[SCALES_WITH]
            each[counter] = each.get(counter, 0) + one[node.name] - none[node.name]
    return StepFlops(full_total, sum(none.values()), each)


def flop_counter() -> FlopCounterMode:
    """torch's counter, with the attention kernel for CPUs that it has no formula for (torch 2.13)."""
    return FlopCounterMode(display=False, custom_mapping={_CPU_ATTENTION: _attention_flops})


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]  # untyped in torch


def node_flops(
    module: fx.GraphModule,
    leaves: Sequence[Any],
    caches: Sequence[tuple[StateSpec, tuple[int, ...]]] = (),
    selected: int = 0,
) -> dict[str, int]:
    """FLOPs of every node for inputs of the same shapes as `leaves`.

    Args:
        caches: cache inputs that follow the leaves.
        selected: how many rows or branches each selection finds.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        inputs = [fake.from_tensor(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        device = next((leaf.device for leaf in leaves if isinstance(leaf, Tensor)), torch.device("cpu"))
        inputs += [torch.empty(shape, dtype=state.dtype, device=device) for state, shape in caches]
        with torch.no_grad(), flop_counter() as counter:
            interpreter = _FlopInterpreter(module, counter, selected)
            interpreter.run(*inputs)
    return interpreter.flops


class _FlopInterpreter(fx.Interpreter):
    """Runs a graph node by node, noting FLOPs; selections find a fixed number of rows."""

    def __init__(self, module: fx.GraphModule, counter: FlopCounterMode, selected: int) -> None:
        super().__init__(module)
        self.counter = counter
        self.selected = selected
        self.flops: dict[str, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        before = self.counter.get_total_flops()
        result = super().run_node(n)
        self.flops[n.name] = self.counter.get_total_flops() - before
        return result

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is rows.select_rows:
            return self._indices(args[0])
        if target is dispatch.plan_recomputed:
            picked = self._indices(args[0])
            return picked, picked, picked, torch.zeros(args[3], dtype=torch.int64, device=picked.device)
        return super().call_function(target, args, kwargs)

    def _indices(self, like: Tensor) -> Tensor:
        return torch.zeros(self.selected, dtype=torch.int64, device=like.device)
