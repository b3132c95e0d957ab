"""What of a transformed model is exported: one functional graph with named caches in and out.

    (x, t, y, cache_in.<site>.<kind> ..., force)  ->  (result, cache_out.<site>.<kind> ..., counters)

With `force` 1 the step is a full one, with 0 a cached one; it is int64, because lengths follow from it and TensorRT
takes no bool for those. Without a policy there are neither caches nor `force`.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from moeca_fx.errors import ExportError
from moeca_fx.graph.rewrite import call
from moeca_fx.graph.state import Counter, StateSpec
from moeca_fx.passes.capture import batch_size
from moeca_fx.passes.insert_cache import insert_forced_cache, share_copy
from moeca_fx.passes.lower_export import lower_export
from moeca_fx.policies.policy import Policy
from moeca_fx.policies.rules import BranchRule
from moeca_fx.runtime.module import TransformedModel
from moeca_fx.runtime.program import Program

FORCE = "force"
COUNTERS = "counters"


@dataclass(frozen=True)
class ExportStep:
    """One step, ready to be exported.

    Attributes:
        module: ``(*tensors, *caches, [force]) -> (*tensors of the result, *caches, [counters])``.
        program: the program it was made from.
        parameters: names of forward's parameters, in the order of the inputs' leaves.
        inputs: the call's tensors, by name; with an example of each.
        constants: what the call's other leaves must be, by position among all leaves.
        results: for every leaf of the result its position among the graph's outputs, or its value.
        states: caches, in order; counters: what the last output counts.
    """

    module: fx.GraphModule
    program: Program
    parameters: tuple[str, ...]
    inputs: dict[str, Tensor]
    constants: dict[int, Any]
    results: tuple[tuple[str, Any], ...]
    states: tuple[StateSpec, ...]
    counters: tuple[Counter, ...]

    @property
    def cached(self) -> bool:
        """Whether it keeps anything from step to step."""
        return bool(self.states)

    @property
    def timestep(self) -> str | None:
        """Name of the timestep; None without a policy."""
        position = self.program.timestep
        if position is None:
            return None
        return list(self.inputs)[position - sum(index < position for index in self.constants)]

    def with_constants(self, tensors: Sequence[Any]) -> list[Any]:
        """All leaves of a call from its tensors."""
        leaves = list(tensors)
        for index, value in sorted(self.constants.items()):
            leaves.insert(index, value)
        return leaves

    @property
    def input_names(self) -> list[str]:
        """Names of the graph's inputs."""
        return [*self.inputs, *(f"cache_in.{state.name}" for state in self.states), *([FORCE] if self.cached else [])]

    @property
    def output_names(self) -> list[str]:
        """Names of the graph's outputs."""
        given = sum(kind == "output" for kind, _ in self.results)
        names = [f"result.{index}" for index in range(given)] if given > 1 else ["result"]
        return [*names, *(f"cache_out.{state.name}" for state in self.states), *([COUNTERS] if self.cached else [])]

    def examples(self, batch: int) -> list[Tensor]:
        """Inputs of the graph for a batch; every cache is a tensor of its own."""
        size = self.batch
        call = [_resized(value, size, batch) for value in self.inputs.values()]
        caches = [torch.full((batch, *s.shape), s.empty, dtype=s.dtype) for s in self.states]
        return [*call, *caches, *([torch.tensor(1)] if self.cached else [])]

    @property
    def batch(self) -> int:
        """Samples of the example inputs."""
        return batch_size(tuple(self.inputs.values()), {})

    def is_batched(self, value: Tensor) -> bool:
        """Whether an input has a leading batch axis."""
        return value.dim() > 0 and value.shape[0] == self.batch


def _resized(value: Tensor, size: int, batch: int) -> Tensor:
    if not value.dim() or value.shape[0] != size:
        return value.clone()
    return value[torch.arange(batch) % size].clone()


def build_step(fast: TransformedModel) -> ExportStep:
    """The step of a transformed model, for the first kind of call that it was traced for.

    Raises:
        ExportError: its policy has no form for export.
    """
    runtime = fast._moeca
    program = next(iter(runtime.programs.values()))
    if runtime.options.storage is not None:
        raise ExportError("export: caches are exported in the model's dtype; transform without cache_dtype")
    work = program.traced
    leaves = pytree.tree_leaves((work.args, work.kwargs))
    if runtime.policy is None:
        module = share_copy(program.traced_module)
        states: tuple[StateSpec, ...] = ()
        counters: tuple[Counter, ...] = ()
    else:
        rule = exportable_rule(runtime.policy)
        forced = insert_forced_cache(program.traced_module, program.sites, rule)
        module, states, counters = forced.module, forced.reads, forced.counters
        _number_for_bool(module)
    lowered = lower_export(module)
    constants = _drop_constants(lowered, leaves)
    names = [node.name for node in lowered.graph.find_nodes(op="placeholder")]
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    results = _only_tensors(lowered, program.outputs)
    positional = inspect.signature(work.model.forward).bind_partial(*work.args).arguments
    parameters = (*positional, *work.kwargs)
    inputs = dict(zip(names, tensors, strict=False))
    return ExportStep(lowered, program, parameters, inputs, constants, results, states, counters)


def exportable_rule(policy: Policy) -> BranchRule:
    """The one rule of a policy whose step is a full one when everything is forced.

    Raises:
        ExportError: names what has no form for export.
    """
    problems = list(_problems(policy))
    if problems:
        raise ExportError(
            f"export: this policy has no form for export: {'; '.join(problems)}; use moeca_fx.MoECa(...), or "
            "policy=None for the model without caches"
        )
    rule = policy.rules[0]
    assert isinstance(rule, BranchRule), "a policy without problems has one rule of the branch level"
    return rule


def _problems(policy: Policy) -> Iterator[str]:
    if policy.schedule.probe is not None:
        yield "its schedule probes the model at every step"
    if len(policy.rules) != 1:
        yield f"expected one rule, found {len(policy.rules)}"
    for rule in policy.rules:
        if not isinstance(rule, BranchRule):
            yield f"rule {rule.name!r} reuses at the {rule.level} level, expected the branch level"
        elif rule.predictor.terms > 1:
            yield f"rule {rule.name!r} forecasts from {rule.predictor.terms} values, expected one that is held"
        elif rule.margin is not None:
            yield f"rule {rule.name!r} has a margin, which a forced step would have to ignore"


def _number_for_bool(module: fx.GraphModule) -> None:
    """Let `force`, the last input, be a number."""
    force = module.graph.find_nodes(op="placeholder")[-1]
    with module.graph.inserting_after(force):
        flag = call(module.graph, torch.gt, force, 0, name=f"{force.name}_flag")
    force.replace_all_uses_with(flag, delete_user_cb=lambda user: user is not flag)
    module.recompile()


def _drop_constants(module: fx.GraphModule, leaves: Sequence[Any]) -> dict[int, Any]:
    """Remove the inputs that are no tensors: the trace holds their values."""
    constants = {}
    placeholders = module.graph.find_nodes(op="placeholder")
    for index, (node, leaf) in enumerate(zip(placeholders, leaves, strict=False)):
        if not isinstance(leaf, Tensor):
            assert not node.users, f"{node.name}: an input that is no tensor is a constant of the trace"
            constants[index] = leaf
            module.graph.erase_node(node)
    module.recompile()
    return constants


def _only_tensors(module: fx.GraphModule, count: int) -> tuple[tuple[str, Any], ...]:
    """Remove results that are no tensors from the outputs; where to find each leaf of the model's own result."""
    output = module.graph.output_node()
    values: Any = output.args[0]
    results: list[tuple[str, Any]] = []
    kept: list[fx.Node] = []
    for value in values[:count]:
        if isinstance(value, fx.Node):
            results.append(("output", len(kept)))
            kept.append(value)
        else:
            results.append(("value", value))
    output.args = ((*kept, *values[count:]),)
    module.recompile()
    return tuple(results)
