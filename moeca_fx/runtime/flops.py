"""FLOPs of full and cached steps: 2 per multiply-add, counted by `torch.utils.flop_counter`.

A full step's work depends on shapes alone, unless slots of branches may be empty. A cached step's is a fixed part plus,
for every node that works on selected rows, a cost a row; both are measured by interpreting the graph on fake tensors
with no row and with one row selected. Multiplied with the step's counters that gives what was executed, routing and
scoring included.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from moeca_fx.graph.state import SCALES_WITH, Counter, StateSpec
from moeca_fx.kernels.families import FAMILIES
from moeca_fx.kernels.formulas import branch_flops
from moeca_fx.ops import dispatch, rows
from moeca_fx.passes.cache.graphs import CachedGraphs, StepGraph

# At least as many numbers as any clock holds; FLOPs do not depend on it.
CLOCK_ROOM = 64
_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass(frozen=True)
class StepCost:
    """FLOPs of a step at one batch size: `fixed` when it selects no row or branch, and by one unit of each counter."""

    fixed: int
    each: dict[Counter, int]

    def executed(self, steps: int, counts: dict[Counter, int]) -> int:
        """FLOPs of this many steps with these counter totals."""
        return self.fixed * steps + sum(cost * counts.get(counter, 0) for counter, cost in self.each.items())


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one batch size.

    Attributes:
        uncached: of a call of the model without a policy.
        full: of a full step, without its probe.
        probe: of the probe that precedes every step of an adaptive schedule.
        rules: of each rule's step, without its probe.
    """

    uncached: StepCost
    full: StepCost
    probe: int = 0
    rules: tuple[StepCost, ...] = ()


def measure_step_flops(
    plain: fx.GraphModule, graphs: CachedGraphs | None, leaves: Sequence[Any], batch: int
) -> StepFlops:
    """Measure all graphs for inputs like `leaves`; nothing is executed."""
    uncached = _cost(plain, leaves, ())
    if graphs is None:
        return StepFlops(uncached, uncached)
    prefix: list[Tensor] = []
    probe = 0
    if graphs.probe is not None:
        state = graphs.probe.state
        probe = sum(node_flops(graphs.probe.module, leaves, [_cache(state, batch)]).values())
        prefix = [_cache(state, batch)]
    full = _cost(graphs.full, leaves, _extra(graphs.full_step, batch, prefix))
    rules = tuple(_cost(rule.module, leaves, _extra(rule, batch, prefix)) for rule in graphs.rules)
    return StepFlops(uncached, full, probe, rules)


def _cache(state: StateSpec, batch: int) -> Tensor:
    return torch.empty(batch, *state.shape, dtype=state.dtype, device="meta")


def _extra(step: StepGraph, batch: int, prefix: list[Tensor]) -> list[Tensor]:
    """What a step takes after the model's inputs."""
    clock = [torch.empty(CLOCK_ROOM, device="meta")] if step.clock else []
    return [*(_cache(state, batch) for state in step.reads), *clock, *(prefix if step.prefix else [])]


def _cost(module: fx.GraphModule, leaves: Sequence[Any], extra: Sequence[Tensor]) -> StepCost:
    none = node_flops(module, leaves, extra, selected=0)
    scaling = [node for node in module.graph.nodes if SCALES_WITH in node.meta]
    one = node_flops(module, leaves, extra, selected=1) if scaling else none
    each: dict[Counter, int] = {}
    for node in scaling:
        counter = node.meta[SCALES_WITH]
        each[counter] = each.get(counter, 0) + one[node.name] - none[node.name]
    return StepCost(sum(none.values()), each)


def full_flops(module: fx.GraphModule, leaves: Sequence[Any], branches: Mapping[Counter, int]) -> dict[str, int]:
    """FLOPs of every node of a model without caches in which no slot is empty.

    Args:
        branches: how many branches each counter of the graph would count then.
    """
    none = node_flops(module, leaves, selected=0)
    scaling = [node for node in module.graph.nodes if SCALES_WITH in node.meta]
    one = node_flops(module, leaves, selected=1) if scaling else none
    more = {node.name: (one[node.name] - none[node.name]) * branches[node.meta[SCALES_WITH]] for node in scaling}
    return {name: count + more.get(name, 0) for name, count in none.items()}


def flop_counter() -> FlopCounterMode:
    """torch's counter, with the attention kernel for CPUs that it has no formula for (torch 2.13)."""
    return FlopCounterMode(display=False, custom_mapping={_CPU_ATTENTION: _attention_flops})


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]  # untyped in torch


def node_flops(
    module: fx.GraphModule,
    leaves: Sequence[Any],
    extra: Sequence[Tensor] = (),
    selected: int = 0,
) -> dict[str, int]:
    """FLOPs of every node for inputs of the same shapes as `leaves`.

    Args:
        extra: tensors, also without data, that follow the leaves.
        selected: how many rows or branches each selection finds.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        inputs = [fake.from_tensor(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        device = next((leaf.device for leaf in leaves if isinstance(leaf, Tensor)), torch.device("cpu"))
        inputs += [torch.empty(tensor.shape, dtype=tensor.dtype, device=device) for tensor in extra]
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
        self.extra = 0  # of a call that the counter cannot see into

    def run_node(self, n: fx.Node) -> Any:
        before = self.counter.get_total_flops()
        result = super().run_node(n)
        self.flops[n.name] = self.counter.get_total_flops() - before + self.extra
        self.extra = 0
        return result

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is rows.select_rows:
            return self._indices(args[0])
        if any(target is family.recompute for family in FAMILIES):
            self.extra += self.selected * branch_flops(args[2:])
            return args[0], args[1]
        if target is dispatch.plan_recomputed:
            picked = self._indices(args[0])
            return picked, picked, picked, torch.zeros(args[3], dtype=torch.int64, device=picked.device)
        return super().call_function(target, args, kwargs)

    def _indices(self, like: Tensor) -> Tensor:
        return torch.zeros(self.selected, dtype=torch.int64, device=like.device)
