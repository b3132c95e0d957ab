"""insert_cache: exact states, actions and node counts of both step graphs, for each config choice."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx

from moeca_fx import MoECa
from moeca_fx.errors import PassError
from moeca_fx.graph.legality import check
from moeca_fx.graph.state import StateSpec
from moeca_fx.inspection import graph_text
from moeca_fx.ops import dispatch, rows
from moeca_fx.ops.attention_rows import attention_rows
from moeca_fx.passes.cache.graphs import CachedGraphs
from moeca_fx.passes.insert_cache import _check_caches_used, share_copy
from moeca_fx.passes.lower_inplace import lower_inplace
from moeca_fx.policies import branch
from tests.helpers import zoo_models
from tests.helpers.compiled import Vectorized, run_steps, vectorized
from tests.helpers.passes import count_ops
from tests.helpers.toys import toy, toy_inputs

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
PATHS = [f"blocks.{i}.{leaf}" for i in range(4) for leaf in ("attn", "mlp")]
ROWS = ["attn", "key", "value"]
MOE = ["expert", "weight", "norm", "feature", "activation"]
SHARED = [*MOE, "shared"]

# Per config: what the two sublayers of blocks 0 to 3 do (0 and 2 are dense), and the states they keep.
CASES: dict[str, tuple[dict[str, Any], list[str], list[list[str]]]] = {
    "defaults": (
        {},
        ["reuse", "reuse", "synchronized", "rows", "rows", "rows", "synchronized", "rows"],
        [["attn"], ["ffn"], ROWS, SHARED, ROWS, ["ffn"], ROWS, SHARED],
    ),
    "attention reused": (
        {"attention": "reuse"},
        ["reuse", "reuse", "reuse", "rows", "reuse", "rows", "reuse", "rows"],
        [["attn"], ["ffn"], ["attn"], SHARED, ["attn"], ["ffn"], ["attn"], SHARED],
    ),
    "attention full": (
        {"attention": "full"},
        ["full", "reuse", "full", "rows", "full", "rows", "full", "rows"],
        [[], ["ffn"], [], SHARED, [], ["ffn"], [], SHARED],
    ),
    "dense reused": (
        {"dense_ffn": "reuse"},
        ["reuse", "reuse", "synchronized", "rows", "reuse", "reuse", "synchronized", "rows"],
        [["attn"], ["ffn"], ROWS, SHARED, ["attn"], ["ffn"], ROWS, SHARED],
    ),
    "dense full": (
        {"dense_ffn": "full"},
        ["full", "full", "synchronized", "rows", "full", "full", "synchronized", "rows"],
        [[], [], ROWS, SHARED, [], [], ROWS, SHARED],
    ),
    "shared reused": (
        {"shared_expert": "reuse"},
        ["reuse", "reuse", "synchronized", "rows", "rows", "rows", "synchronized", "rows"],
        [["attn"], ["ffn"], ROWS, SHARED, ROWS, ["ffn"], ROWS, SHARED],
    ),
    "shared full": (
        {"shared_expert": "full"},
        ["reuse", "reuse", "synchronized", "rows", "rows", "rows", "synchronized", "rows"],
        [["attn"], ["ffn"], ROWS, MOE, ROWS, ["ffn"], ROWS, MOE],
    ),
    "all full": (
        {"attention": "full", "dense_ffn": "full", "shared_expert": "full"},
        ["full", "full", "full", "rows", "full", "full", "full", "rows"],
        [[], [], [], MOE, [], [], [], MOE],
    ),
}
# Calls in the cached graph: decisions, attention by rows, dense attention, row selections, writes, writes in place.
COUNTS = {
    "defaults": (4, 3, 0, 4, 24, 18),
    "attention reused": (2, 0, 0, 3, 7, 7),
    "attention full": (2, 0, 4, 3, 7, 7),
    "dense reused": (4, 2, 0, 4, 20, 14),
    "dense full": (4, 2, 2, 4, 20, 14),
    "shared reused": (4, 3, 0, 2, 22, 16),
    "shared full": (4, 3, 0, 2, 22, 16),
    "all full": (2, 0, 4, 0, 4, 4),
}


@pytest.fixture(scope="module")
def dsmoe() -> Vectorized:
    return vectorized(zoo_models.tiny_dsmoe(depth=4), zoo_models.inputs())


@pytest.mark.parametrize("case", CASES)
def test_actions_states_and_node_counts(dsmoe: Vectorized, case: str) -> None:
    options, actions, kinds = CASES[case]
    before = graph_text(dsmoe.module)
    graphs = dsmoe.graphs(MoECa(**options))
    assert graphs.actions == tuple(zip(PATHS, actions, strict=True))
    names = [f"{path}.{kind}" for path, held in zip(PATHS, kinds, strict=True) for kind in held]
    assert [state.name for state in graphs.states] == names
    assert [state.name for state in graphs.states if state.carried] == [
        name for name in names if name.endswith(".activation")
    ]
    cached = graphs.cached
    counts = [count_ops(cached, t) for t in (branch.decide, attention_rows._opoverload, SDPA, rows.select_rows)]
    assert (*counts, count_ops(cached, rows.write_rows)) == COUNTS[case][:5]
    assert count_ops(cached, dispatch.plan_recomputed) == 2 and count_ops(cached, dispatch.plan_branches) == 0
    _check_signatures(dsmoe.module, graphs)
    assert graph_text(dsmoe.module) == before, "the vectorised graph was changed"
    check("insert_cache", graphs.full)
    check("insert_cache", cached)
    assert lower_inplace(cached) == COUNTS[case][5] and lower_inplace(cached) == 0


def _check_signatures(plain: fx.GraphModule, graphs: CachedGraphs) -> None:
    """Inputs and results are the model's own, then the states in order; every cache input is read."""
    own = [node.name for node in plain.graph.find_nodes(op="placeholder")]
    inputs, results = {}, {}
    for name in ("full", "cached"):
        graph = getattr(graphs, name).graph
        graph.lint()
        inputs[name] = graph.find_nodes(op="placeholder")
        results[name] = graph.output_node().args[0]
    own_results = len(plain.graph.output_node().args[0])  # type: ignore[arg-type]  # a tuple
    caches = [state.node_name for state in graphs.states]
    carried = [state.node_name for state in graphs.states if state.carried]
    assert [node.name for node in inputs["full"]] == own + carried
    assert [node.name for node in inputs["cached"]] == own + caches
    assert all(node.users for node in inputs["cached"])
    assert len(results["full"]) == own_results + len(caches)
    assert len(results["cached"]) == own_results + len(caches) + 1


def test_the_full_step_only_adds_what_it_stores(dsmoe: Vectorized) -> None:
    full = dsmoe.graphs(MoECa()).full
    for target in (SDPA, aten.linear.default, aten.topk.default, dispatch.plan_branches, dispatch.gather_branches):
        assert count_ops(full, target) == count_ops(dsmoe.module, target)
    assert count_ops(full, branch.update_activation) == 2 and count_ops(full, dispatch.feature_norm) == 2


def test_the_full_step_computes_what_the_vectorised_graph_does(dsmoe: Vectorized) -> None:
    x, t, y = zoo_models.inputs(3, seed=3, t=0.2)
    with torch.no_grad():
        expected = dsmoe.module(x, t, y)[0]
    (found,), _ = run_steps(dsmoe.graphs(MoECa()), [(x, t, y)], outputs=6)
    assert torch.equal(found, expected)


def test_parameters_are_shared_between_all_graphs(dsmoe: Vectorized) -> None:
    graphs = dsmoe.graphs(MoECa())
    owned = {p.untyped_storage().data_ptr() for p in dsmoe.model.parameters()}
    owned |= {b.untyped_storage().data_ptr() for b in dsmoe.module.buffers()}
    for module in (graphs.full, graphs.cached):
        held = [*module.parameters(), *module.buffers()]
        assert held and {tensor.untyped_storage().data_ptr() for tensor in held} <= owned


@pytest.mark.parametrize("tau0", [0.0, 50.0], ids=["all", "none"])
def test_counters_at_both_ends(tau0: float) -> None:
    made = vectorized(toy(), toy_inputs())
    graphs = made.graphs(MoECa(tau0=tau0))
    steps: list[tuple[torch.Tensor, ...]] = [toy_inputs(2, clock=0.0), toy_inputs(2, clock=0.001)]
    (_, found), (counted,) = run_steps(graphs, steps)
    counts = {counter.kind: int(n) for counter, n in zip(graphs.counters, counted, strict=True)}
    branches, tokens = 2 * 6 * 2, 2 * 6
    recomputed = {0.0: (branches, tokens), 50.0: (0, 0)}[tau0]
    assert counts == {
        "matched": branches,
        "recomputed": recomputed[0],
        "attention_rows": recomputed[1],
        "attention_padded": recomputed[1],
        "shared_rows": recomputed[1],
    }
    with torch.no_grad():
        error = float((found - made.model(*steps[1])).abs().max())
    assert error < 1e-5 if tau0 == 0.0 else 0 < error < 1e-2  # everything new, or what was cached under the new gates


def test_a_cache_that_is_never_read_is_an_error(dsmoe: Vectorized) -> None:
    graphs = dsmoe.graphs(MoECa())
    forgotten = StateSpec("blocks", "forgotten", (3,), torch.float32)
    cached = share_copy(graphs.cached)
    last = cached.graph.find_nodes(op="placeholder")[-1]
    with cached.graph.inserting_after(last):
        node = cached.graph.placeholder(forgotten.node_name)
    output = cached.graph.output_node()
    output.args = ((*output.args[0], node),)  # handed on, but never computed with
    broken = replace(graphs.rules[0], module=cached)
    with pytest.raises(PassError, match="no step reads cache_blocks_forgotten"):
        _check_caches_used((broken,), (*graphs.states, forgotten))
    _check_caches_used(graphs.rules, graphs.states)
