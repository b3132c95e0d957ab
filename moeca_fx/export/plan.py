"""What of a transformed model is exported: its graphs with named caches in and out, and which of them a step runs.

    one       model(x, t, y, cache_in.<site>.<kind> ..., force)  ->  result, cache_out.<site>.<kind> ..., counters
    steps     full, cached (and further rules), probe: a graph each
    compiled  the same as `torch.compile` would get them: kernels, writes in place

With `force` 1 the one graph is a full step, with 0 a cached one; it is int64, because lengths follow from it and
TensorRT takes no bool for those. Without a policy there is one graph without caches.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from moeca_fx.batch import batch_size
from moeca_fx.errors import ConfigError, ExportError
from moeca_fx.export.graph import (
    CACHE_IN,
    CACHE_OUT,
    CLOCK,
    COUNTERS,
    FORCE,
    STREAM,
    ExportGraph,
    Port,
    cache_port,
    make_graph,
    result_ports,
    tensor_port,
)
from moeca_fx.graph.rewrite import call
from moeca_fx.graph.state import Counter, StateSpec
from moeca_fx.kernels.cpu import ops as cpu
from moeca_fx.kernels.families import FAMILIES
from moeca_fx.passes.cache.graphs import CachedGraphs, ProbeGraph, StepGraph
from moeca_fx.passes.insert_cache import insert_cache, insert_forced_cache, share_copy
from moeca_fx.passes.lower_export import Experts, lower_export
from moeca_fx.passes.lower_inplace import IN_PLACE
from moeca_fx.policies.policy import Policy
from moeca_fx.policies.rules import BranchRule
from moeca_fx.runtime.module import TransformedModel
from moeca_fx.runtime.program import Program

Form = Literal["auto", "one", "steps", "compiled"]
FORMS: tuple[Form, ...] = ("auto", "one", "steps", "compiled")
FULL, PROBE = "full", "probe"
_EXAMPLES = 2  # a batch of one would be taken for a fixed size


@dataclass(frozen=True)
class ExportStep:
    """How a step of the runtime is run.

    Attributes:
        name: as in `CachedGraphs.modules`; "" is the model without caches.
        graph: name of its graph.
        force: value of the graph's input of that name; None where it has none.
        reads: caches that it takes.
        clock, prefix: whether it takes the step's numbers, and the stream that the probe computed.
        counters: what its last output counts.
        actions: (site path, what it does in this step).
    """

    name: str
    graph: str
    force: int | None = None
    reads: tuple[StateSpec, ...] = ()
    clock: bool = False
    prefix: bool = False
    counters: tuple[Counter, ...] = ()
    actions: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class ExportPlan:
    """All that is exported of a transformed model.

    Attributes:
        program: what it is made from.
        parameters: names of forward's parameters, in the order of the inputs' leaves.
        inputs: the call's tensors, by name; with an example of each. call_ports: what they are.
        constants: what the call's other leaves must be, by position among all leaves.
        states: caches, in the order in which every step returns them.
        probe: of an adaptive schedule.
        graphs, steps: see there.
    """

    program: Program
    parameters: tuple[str, ...]
    inputs: dict[str, Tensor]
    call_ports: tuple[Port, ...]
    constants: dict[int, Any]
    states: tuple[StateSpec, ...]
    probe: ProbeGraph | None
    graphs: tuple[ExportGraph, ...]
    steps: tuple[ExportStep, ...]

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

    def call(self, batch: int) -> list[Tensor]:
        """Tensors of a call of this many samples, from the example's."""
        size = batch_size(tuple(self.inputs.values()), {})
        return [_resized(value, size, batch) for value in self.inputs.values()]


def _resized(value: Tensor, size: int, batch: int) -> Tensor:
    if not value.dim() or value.shape[0] != size:
        return value.clone()
    return value[torch.arange(batch) % size].clone()


def build_plan(fast: TransformedModel, form: Form = "auto", experts: Experts = "padded") -> ExportPlan:
    """The graphs of a transformed model, for the first kind of call that it was traced for.

    Args:
        form: see this module; ``auto`` is ``one`` where the policy allows it, else ``steps``.
        experts: see `lower_export`; ``compiled`` graphs run the experts' kernels.

    Raises:
        ConfigError: no such form.
        ExportError: its policy has no form for export.
    """
    if form not in FORMS:
        raise ConfigError(f"graphs: expected one of {', '.join(FORMS)}, found {form!r}")
    runtime = fast._moeca
    program = next(iter(runtime.programs.values()))
    _check_layouts(program)
    if runtime.options.storage is not None:
        raise ExportError("export: caches are exported in the model's dtype; transform without cache_dtype")
    builder = _Builder(program, runtime.policy, experts if form != "compiled" else None)
    if runtime.policy is None:
        builder.add_plain()
        return builder.plan((), None)
    if form == "one" or (form == "auto" and not list(_problems(runtime.policy))):
        step = insert_forced_cache(program.traced_module, program.sites, exportable_rule(runtime.policy))
        builder.add_forced(step)
        return builder.plan(tuple(replace(state, carried=True) for state in step.reads), None)
    if form == "compiled":
        assert program.graphs is not None, "a policy has graphs"
        graphs = program.graphs
    else:
        graphs = insert_cache(program.traced_module, program.sites, runtime.policy)
    builder.add_steps(graphs)
    return builder.plan(graphs.states, graphs.probe)


def _check_layouts(program: Program) -> None:
    """Refuse what no format has a form for.

    Raises:
        ExportError: names the site.
    """
    for site in program.sites.moe:
        if site.layout == "expert":
            raise ExportError(
                f"export: {site.path} routes by expert choice (each expert takes its tokens), which has no form for "
                "export; expected token choice; run this model through moeca_fx.transform"
            )
        if site.empty_slots:
            raise ExportError(
                f"export: tokens of {site.path} may have fewer than {site.top_k} experts, and empty slots have no form "
                "for export; expected an expert in every slot; run this model through moeca_fx.transform"
            )


class _Builder:
    """Collects the graphs of a plan.

    Args:
        experts: for graphs in operations that ONNX can hold; None for those that are compiled.
    """

    def __init__(self, program: Program, policy: Policy | None, experts: Experts | None) -> None:
        self.program, self.policy, self.experts = program, policy, experts
        if program.why_fixed is not None:
            raise ExportError(
                f"{type(program.traced.model).__name__}: expected a model for any batch size, found one that is "
                f"not: {program.why_fixed}; run it in PyTorch, where each batch size is traced for itself"
            )
        work = program.traced
        leaves = pytree.tree_leaves((work.args, work.kwargs))
        placeholders = program.traced_module.graph.find_nodes(op="placeholder")
        self.constants = {index: leaf for index, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)}
        self.inputs = {
            node.name: leaf for node, leaf in zip(placeholders, leaves, strict=True) if isinstance(leaf, Tensor)
        }
        size = batch_size(tuple(self.inputs.values()), {})
        self.call = [tensor_port(n, v, v.dim() > 0 and v.shape[0] == size) for n, v in self.inputs.items()]
        self.examples = [_resized(value, size, _EXAMPLES) for value in self.inputs.values()]
        self.results = result_ports(program.traced_module, program.outputs)
        self.graphs: list[ExportGraph] = []
        self.steps: list[ExportStep] = []

    def plan(self, states: tuple[StateSpec, ...], probe: ProbeGraph | None) -> ExportPlan:
        """What was collected."""
        work = self.program.traced
        positional = inspect.signature(work.model.forward).bind_partial(*work.args).arguments
        return ExportPlan(
            program=self.program,
            parameters=(*positional, *work.kwargs),
            inputs=self.inputs,
            call_ports=tuple(self.call),
            constants=self.constants,
            states=states,
            probe=probe,
            graphs=tuple(self.graphs),
            steps=tuple(self.steps),
        )

    def add_plain(self) -> None:
        """The model without caches."""
        module = share_copy(self.program.traced_module) if self.experts else self.program.plain
        self._add("model", module, [], [], self.results)
        self.steps.append(ExportStep("", "model"))

    def add_forced(self, step: StepGraph) -> None:
        """Full and cached step as one graph."""
        _number_for_bool(step.module)
        force = (Port(FORCE, (), torch.int64), torch.tensor(1))
        self._add("model", step.module, step.reads, [force], self._outputs(step.reads, step.counters))
        for name, value in ((FULL, 1), (step_name(self.policy), 0)):
            self.steps.append(ExportStep(name, "model", value, step.reads, False, False, step.counters, step.actions))

    def add_steps(self, graphs: CachedGraphs) -> None:
        """A graph a step."""
        stream: list[tuple[Port, Tensor]] = []
        if graphs.probe is not None:
            stream = self._add_probe(graphs.probe)
        for step in (graphs.full_step, *graphs.rules):
            extra = [self._clock()] if step.clock else []
            extra += stream if step.prefix else []
            self._add(step.name, step.module, step.reads, extra, self._outputs(graphs.states, step.counters))
            facts = (step.reads, step.clock, step.prefix, step.counters, step.actions)
            self.steps.append(ExportStep(step.name, step.name, None, *facts))

    def _add_probe(self, probe: ProbeGraph) -> list[tuple[Port, Tensor]]:
        """The probe, and the stream that its graph hands on, if any."""
        state = probe.state
        value = cache_port(CACHE_OUT, state)
        outputs = [Port("change", (), torch.float32), value]
        if len(probe.module.graph.output_node().args[0]) > len(outputs):  # type: ignore[arg-type]  # a tuple
            outputs.append(Port(STREAM, value.shape, value.dtype))
        self._add(PROBE, probe.module, (state,), [], outputs)
        self.steps.append(ExportStep(PROBE, PROBE, reads=(state,)))
        return [(port, torch.zeros(port.sized(_EXAMPLES), dtype=port.dtype)) for port in outputs[2:]]

    def _clock(self) -> tuple[Port, Tensor]:
        assert self.policy is not None
        numbers = len(self.policy.rules[0].clock(1, [0]))
        return Port(CLOCK, (numbers,), torch.float32), torch.zeros(numbers)

    def _outputs(self, states: Sequence[StateSpec], counters: Sequence[Counter]) -> list[Port]:
        counted = [Port(COUNTERS, (len(counters),), torch.int64)] if counters else []
        return [*self.results, *(cache_port(CACHE_OUT, state) for state in states), *counted]

    def _add(
        self,
        name: str,
        module: fx.GraphModule,
        reads: Sequence[StateSpec],
        extra: Sequence[tuple[Port, Tensor]],
        outputs: Sequence[Port],
    ) -> None:
        module = lower_export(module, self.experts) if self.experts else share_copy(module)
        _drop_constants(module, self.constants)
        caches = [torch.full((_EXAMPLES, *s.shape), s.empty, dtype=s.dtype) for s in reads]
        self.graphs.append(
            make_graph(
                name,
                module,
                [*self.call, *(cache_port(CACHE_IN, state) for state in reads), *(port for port, _ in extra)],
                outputs,
                [*self.examples, *caches, *(value for _, value in extra)],
                () if self.experts else _WRITES_IN_PLACE,
            )
        )


def step_name(policy: Policy | None) -> str:
    """Name of the step of a policy's first rule."""
    assert policy is not None
    return policy.rules[0].name


_WRITES_IN_PLACE = frozenset((*IN_PLACE.values(), cpu.update_activation_, *(family.recompute for family in FAMILIES)))


def exportable_rule(policy: Policy) -> BranchRule:
    """The one rule of a policy whose step is a full one when everything is forced.

    Raises:
        ExportError: names what has no such form.
    """
    problems = list(_problems(policy))
    if problems:
        raise ExportError(
            f"export: this policy has no form as one graph: {'; '.join(problems)}; export a graph a step "
            "(graphs='steps'), or use moeca_fx.MoECa(...)"
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


def _drop_constants(module: fx.GraphModule, constants: dict[int, Any]) -> None:
    """Remove the inputs that are no tensors: the trace holds their values."""
    placeholders = module.graph.find_nodes(op="placeholder")
    for index in constants:
        node = placeholders[index]
        assert not node.users, f"{node.name}: an input that is no tensor is a constant of the trace"
        module.graph.erase_node(node)
    module.recompile()
