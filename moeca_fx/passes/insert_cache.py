"""insert_cache: from one vectorised graph, a full step and one step for each rule, with explicit caches.

    eps = graph(x, t, y)      -->     eps, caches           = full(x, t, y, caches carried over)
                                      eps, caches, counters = cached(x, t, y, caches, [clock])

Caches are placeholders and results, named ``cache_<site>_<kind>``; nothing is hidden in hooks or modules. What a rule's
step does is in `cache/`, one file a level; the clock holds the numbers of this step that the host knows.
"""

import copy

import torch
from torch import Tensor, fx, nn

from moeca_fx.errors import PassError
from moeca_fx.graph.rewrite import call, copy_meta, finish
from moeca_fx.graph.sites import Sites
from moeca_fx.graph.state import StateSpec
from moeca_fx.ops import present
from moeca_fx.passes.cache.blocks_level import BlocksLevel
from moeca_fx.passes.cache.branch_level import BranchLevel
from moeca_fx.passes.cache.builder import StepBuilder
from moeca_fx.passes.cache.graphs import CachedGraphs, StepGraph
from moeca_fx.passes.cache.level import Level, actions_of, nodes_by_name
from moeca_fx.passes.cache.output_level import OutputLevel
from moeca_fx.passes.cache.probe import build_probe, continues_from
from moeca_fx.passes.cache.sublayer_level import SublayerLevel
from moeca_fx.policies.policy import Policy
from moeca_fx.policies.rules import BlocksRule, BranchRule, OutputRule, Rule, SublayerRule

CLOCK = "moeca_clock"
PREFIX = "moeca_prefix"
FORCE = "moeca_force"
"""Names of inputs beside the model's own, whose forward may call a parameter `clock`."""


def plan_level(module: fx.GraphModule, sites: Sites, rule: Rule) -> Level:
    """The level of a rule on a located graph; nothing is edited."""
    if isinstance(rule, OutputRule):
        return OutputLevel(module, sites, rule)
    if isinstance(rule, BlocksRule):
        return BlocksLevel(module, sites, rule)
    if isinstance(rule, SublayerRule):
        return SublayerLevel(module, sites, rule)
    assert isinstance(rule, BranchRule), f"{rule!r}: no level that this pass knows"
    return BranchLevel(module, sites, rule)


def plan_states(module: fx.GraphModule, sites: Sites, policy: Policy) -> tuple[StateSpec, ...]:
    """Every cache tensor that the policy keeps, from a located graph; a probe's value is the last."""
    states = [state for rule in policy.rules for state in plan_level(module, sites, rule).states]
    if policy.schedule.probe is not None:
        states.append(build_probe(share_copy(module), sites, policy.schedule.probe).state)
    return tuple(states)


def stack_counters(counters: list[Tensor]) -> Tensor:
    """Counters as one tensor [C]."""
    return torch.stack(counters)


def insert_cache(module: fx.GraphModule, sites: Sites, policy: Policy) -> CachedGraphs:
    """Build every step; `module` is left as it is.

    Args:
        module: vectorised graph.
        sites: its sites, from `vectorize_experts`.
        policy: what is recomputed when.
    """
    levels = [plan_level(module, sites, rule) for rule in policy.rules]
    states = tuple(state for level in levels for state in level.states)
    probe = policy.schedule.probe
    stream = continues_from(sites, probe)
    full = _full_step(share_copy(module), sites, levels, states, stream)
    rules = tuple(
        _rule_step(share_copy(module), sites, rule, levels, position, states, stream)
        for position, rule in enumerate(policy.rules)
    )
    _check_caches_used(rules, states)
    made = build_probe(share_copy(module), sites, probe) if probe is not None else None
    return CachedGraphs(full, rules, states, made)


def insert_forced_cache(module: fx.GraphModule, sites: Sites, rule: BranchRule) -> StepGraph:
    """One step for full and cached alike: its last input, `FORCE` [] bool, recomputes everything.

    Caches that hold no expert yet (`StateSpec.empty`) need no other first step. `module` is left as it is.
    """
    level = plan_level(module, sites, rule)
    step = _open(share_copy(module), level.states, rule.has_clock, None)
    step.force = _add_input(step.module, FORCE)
    with step.graph.inserting_before(step.graph.output_node()):
        step.terms = level.terms
        level.rewrite(step)
        results = [step.updated.get(state.name, step.cache[state.name]) for state in level.states]
        results.append(call(step.graph, stack_counters, [node for _, node in step.counters], name="counters"))
    _append_outputs(step.module, results)
    finished = finish(step.module, "insert_cache (forced step)")
    counters = tuple(counter for counter, _ in step.counters)
    return StepGraph("forced", finished, level.states, rule.has_clock, False, counters, level.actions)


def _full_step(
    module: fx.GraphModule, sites: Sites, levels: list[Level], states: tuple[StateSpec, ...], stream: str | None
) -> StepGraph:
    reads = tuple(state for state in states if state.carried)
    with_clock = any(level.store_reads_clock for level in levels)
    step = _open(module, reads, with_clock, stream)
    with module.graph.inserting_before(module.graph.output_node()):
        for level in levels:
            step.terms = level.terms
            level.store(step)
        actions = actions_of(sites, "full")
        results = [*(step.updated[state.name] for state in states), *_counters(step, sites, actions)]
    _append_outputs(module, results)
    module = finish(module, "insert_cache (full step)")
    counters = tuple(counter for counter, _ in step.counters)
    return StepGraph("full", module, reads, with_clock, stream is not None, counters, actions)


def _rule_step(
    module: fx.GraphModule,
    sites: Sites,
    rule: Rule,
    levels: list[Level],
    position: int,
    states: tuple[StateSpec, ...],
    stream: str | None,
) -> StepGraph:
    level = levels[position]
    step = _open(module, states, rule.has_clock, stream)
    with module.graph.inserting_before(module.graph.output_node()):
        step.terms = level.terms
        level.rewrite(step)
        for other in levels:
            if other is not level:
                step.terms = other.terms
                other.follow(step)
        results = [step.updated.get(state.name, step.cache[state.name]) for state in states]
        results += _counters(step, sites, level.actions)
    _append_outputs(module, results)
    module = finish(module, f"insert_cache ({rule.name} step)")
    counters = tuple(counter for counter, _ in step.counters)
    return StepGraph(rule.name, module, states, rule.has_clock, stream is not None, counters, level.actions)


def _counters(step: StepBuilder, sites: Sites, actions: tuple[tuple[str, str], ...]) -> list[fx.Node]:
    """One tensor of all that the step counts, if anything: also the branches of sites that run as the model wrote them.

    Those are known beforehand but where slots may be empty.
    """
    done = dict(actions)
    for site in sites.moe:
        if site.empty_slots and done[site.path] == "full":
            step.count(site.path, "present", present.count_present, step.nodes[site.expert], site.num_experts)
    if not step.counters:
        return []
    return [call(step.graph, stack_counters, [node for _, node in step.counters], name="counters")]


def _open(module: fx.GraphModule, reads: tuple[StateSpec, ...], clock: bool, stream: str | None) -> StepBuilder:
    """Add the step's inputs; the token stream that a probe computed replaces the nodes that compute it."""
    nodes = nodes_by_name(module)
    cache = _add_inputs(module, reads)
    step = StepBuilder(module, cache, nodes, _add_input(module, CLOCK) if clock else None)
    if stream is not None:
        prefix = _add_input(module, PREFIX)
        copy_meta(nodes[stream], prefix)
        nodes[stream].replace_all_uses_with(prefix)
        nodes[stream] = prefix
    return step


def share_copy(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph that shares every parameter and buffer; node names stay the same."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    _copy_names(module.graph, graph)
    return fx.GraphModule(module, graph)


def detached_copy(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph over the same memory whose parameters and buffers are objects of its own.

    What replaces the contents of the original's parameters (`Module.to`) does not reach the copy.
    """
    copied = share_copy(module)
    for part in copied.modules():
        for name, parameter in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.detach())
    return copied


def _copy_names(source: fx.Graph, target: fx.Graph) -> None:
    for old, new in zip(source.nodes, target.nodes, strict=True):
        new.meta = copy.copy(old.meta)
        assert old.op == "output" or new.name == old.name, f"{old.name} became {new.name} in the copy"


def _add_input(module: fx.GraphModule, name: str) -> fx.Node:
    with module.graph.inserting_after(module.graph.find_nodes(op="placeholder")[-1]):
        return module.graph.placeholder(name)


def _add_inputs(module: fx.GraphModule, states: tuple[StateSpec, ...]) -> dict[str, fx.Node]:
    return {state.name: _add_input(module, state.node_name) for state in states}


def _append_outputs(module: fx.GraphModule, results: list[fx.Node]) -> None:
    output = module.graph.output_node()
    existing = output.args[0]
    assert isinstance(existing, tuple), "capture flattens the output to a tuple"
    output.args = ((*existing, *results),)


def _check_caches_used(rules: tuple[StepGraph, ...], states: tuple[StateSpec, ...]) -> None:
    """Some step must compute with every cache: a tied or forgotten one would silently hold old values."""
    for state in states:
        inputs = [node for rule in rules for node in rule.module.graph.nodes if node.name == state.node_name]
        if not any(user.op != "output" for node in inputs for user in node.users):
            raise PassError(f"insert_cache: no step reads {state.node_name}; please report this model")
