"""`check_pass`: what every pass over a graph must keep, asserted in one place. And captured graphs to run passes on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from moeca_fx.discover import discover
from moeca_fx.graph.sites import Sites
from moeca_fx.inspection import graph_text
from moeca_fx.ops import live_regions
from moeca_fx.passes.capture import Captured, capture
from moeca_fx.passes.insert_cache import share_copy
from moeca_fx.passes.locate import locate
from moeca_fx.passes.normalize import normalize


def count_ops(module: fx.GraphModule, target: Any) -> int:
    """How many nodes call `target`."""
    return sum(node.op == "call_function" and node.target is target for node in module.graph.nodes)


def check_pass(
    module: fx.GraphModule,
    run: Callable[[fx.GraphModule], object],
    examples: Sequence[Sequence[Any]],
    ops: Mapping[Any, tuple[int, int]],
    tolerance: float = 0.0,
) -> fx.GraphModule:
    """Run a pass on a copy of `module` and assert what must hold; returns the rewritten copy.

    Args:
        module: graph before the pass.
        run: applies the pass in place.
        examples: inputs to compare results on.
        ops: exact number of calls of each target before and after.
        tolerance: largest difference relative to the largest value; 0 demands equality bit for bit.
    """
    after = share_copy(module)
    expected = [module(*example) for example in examples]
    before_counts = {target: count_ops(module, target) for target in ops}
    assert before_counts == {target: before for target, (before, _) in ops.items()}, "calls before the pass"
    run(after)
    after.graph.lint()
    assert {target: count_ops(after, target) for target in ops} == {t: n for t, (_, n) in ops.items()}
    _assert_same_signature(module, after)
    for example, want in zip(examples, expected, strict=True):
        _assert_equal(after(*example), want, tolerance)
    text = graph_text(after)
    run(after)
    assert graph_text(after) == text, "a second run rewrote something"
    return after


def _assert_same_signature(before: fx.GraphModule, after: fx.GraphModule) -> None:
    inputs = [[node.name for node in m.graph.find_nodes(op="placeholder")] for m in (before, after)]
    assert inputs[0] == inputs[1]
    results = [m.graph.output_node().args[0] for m in (before, after)]
    assert all(isinstance(result, tuple) for result in results)
    assert len(results[0]) == len(results[1])  # type: ignore[arg-type]  # both are tuples


def _assert_equal(found: Sequence[Any], expected: Sequence[Any], tolerance: float) -> None:
    for have, want in zip(found, expected, strict=True):
        if not isinstance(want, Tensor):
            assert have == want
        elif tolerance == 0.0:
            assert torch.equal(have, want), f"differs by {float((have - want).abs().max()):.1e}"
        else:
            assert float((have - want).abs().max()) <= tolerance * float(want.abs().max())


@dataclass(frozen=True)
class Stage:
    """A model captured, normalised and located, and its regions kept runnable by `live`."""

    model: nn.Module
    captured: Captured
    normalized: fx.GraphModule
    sites: Sites

    def live(self) -> Any:
        """Context in which the markers of the graphs run."""
        calls = {}
        for key, region in self.captured.regions.items():
            method = getattr(self.model.get_submodule(region.path), region.method)
            names = (region.x, region.expert, region.weight)
            calls[key] = lambda *values, method=method, names=names: method(**dict(zip(names, values, strict=True)))
        return live_regions(calls)


def staged(model: nn.Module, inputs: tuple[Tensor, ...]) -> Stage:
    """Capture, normalise and locate."""
    with torch.no_grad():
        captured = capture(model, discover(model, inputs, {}).regions, inputs, {})
        normalized = normalize(share_copy(captured.module))
        return Stage(model, captured, normalized, locate(normalized, captured.regions))
