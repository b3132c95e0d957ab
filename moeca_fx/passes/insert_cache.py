"""insert_cache: from one vectorised graph, a full step and a cached step with explicit cache inputs and outputs.

    eps = graph(x, t, y)      -->     eps, caches           = full(x, t, y, activation)
                                      eps, caches, counters = cached(x, t, y, caches)

Caches are placeholders and results, named ``cache_<site>_<kind>``; nothing is hidden in hooks or modules. What the two
steps do is in `cache/full_step.py` and `cache/cached_step.py`.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from moeca_fx.errors import PassError
from moeca_fx.graph.rewrite import call, finish
from moeca_fx.graph.sites import Sites
from moeca_fx.graph.state import Counter, StateSpec
from moeca_fx.passes.cache.cached_step import insert_cached_step
from moeca_fx.passes.cache.full_step import insert_full_step
from moeca_fx.passes.cache.plan import plan_sites
from moeca_fx.policies import MoECa


@dataclass(frozen=True)
class CachedGraphs:
    """The two step graphs of a transformed model.

    Attributes:
        full: ``(*inputs, *carried states) -> (*outputs, *states)``.
        cached: ``(*inputs, *states) -> (*outputs, *states, counters [C] int64)``.
        states: cache tensors, in that order.
        counters: meaning of each counter.
        actions: (site path, what it does on a cached step), in network order.
    """

    full: fx.GraphModule
    cached: fx.GraphModule
    states: tuple[StateSpec, ...]
    counters: tuple[Counter, ...]
    actions: tuple[tuple[str, str], ...]


def stack_counters(counters: list[Tensor]) -> Tensor:
    """Counters as one tensor [C]."""
    return torch.stack(counters)


def insert_cache(module: fx.GraphModule, sites: Sites, policy: MoECa) -> CachedGraphs:
    """Build both steps; `module` is left as it is.

    Args:
        module: vectorised graph.
        sites: its sites, from `vectorize_experts`.
        policy: what is recomputed when.
    """
    plans = plan_sites(module, sites, policy)
    states = tuple(state for plan in plans for state in plan.states)
    full, cached = share_copy(module), share_copy(module)

    carried = _add_inputs(full, [state for state in states if state.carried])
    stored = insert_full_step(full, plans, policy, carried)
    _append_outputs(full, [stored[state.name] for state in states])

    step = insert_cached_step(cached, plans, policy, _add_inputs(cached, states))
    results = [step.updated[state.name] for state in states]
    with cached.graph.inserting_before(cached.graph.output_node()):
        results.append(call(cached.graph, stack_counters, [node for _, node in step.counters], name="counters"))
    _append_outputs(cached, results)

    graphs = CachedGraphs(
        full=finish(full, "insert_cache (full step)"),
        cached=finish(cached, "insert_cache (cached step)"),
        states=states,
        counters=tuple(counter for counter, _ in step.counters),
        actions=tuple((plan.site.path, plan.action) for plan in plans),
    )
    _check_caches_used(graphs)
    return graphs


def share_copy(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph that shares every parameter and buffer; node names stay the same."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    _copy_names(module.graph, graph)
    return fx.GraphModule(module, graph)


def _copy_names(source: fx.Graph, target: fx.Graph) -> None:
    for old, new in zip(source.nodes, target.nodes, strict=True):
        new.meta = copy.copy(old.meta)
        assert old.op == "output" or new.name == old.name, f"{old.name} became {new.name} in the copy"


def _add_inputs(module: fx.GraphModule, states: list[StateSpec] | tuple[StateSpec, ...]) -> dict[str, fx.Node]:
    last = module.graph.find_nodes(op="placeholder")[-1]
    inputs = {}
    for state in states:
        with module.graph.inserting_after(last):
            last = inputs[state.name] = module.graph.placeholder(state.node_name)
    return inputs


def _append_outputs(module: fx.GraphModule, results: list[fx.Node]) -> None:
    output = module.graph.output_node()
    existing = output.args[0]
    assert isinstance(existing, tuple), "capture flattens the output to a tuple"
    output.args = ((*existing, *results),)


def _check_caches_used(graphs: CachedGraphs) -> None:
    """Every cache input must be read: a tied or forgotten one would silently hold old values."""
    for node in graphs.cached.graph.find_nodes(op="placeholder"):
        if node.name.startswith("cache_") and not node.users:
            raise PassError(f"insert_cache: the cached step never reads {node.name}; please report this model")
