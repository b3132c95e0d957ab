"""store_caches: states in bf16 and fp8, exact bytes, rows read and written as rows, results close but not equal."""

from functools import cache

import pytest
import torch

import moeca_fx
from moeca_fx import MoECa, policies
from moeca_fx.errors import ConfigError
from moeca_fx.graph.rewrite import example_value
from moeca_fx.graph.state import StateSpec
from moeca_fx.graph.storage import CacheDtype, find_storage, stored
from moeca_fx.inspection import graph_text
from moeca_fx.ops import forecast, rows, storage
from moeca_fx.passes.lower_inplace import lower_inplace
from moeca_fx.passes.store_caches import store_caches
from moeca_fx.policies import Method
from moeca_fx.runtime.module import TransformedModel
from tests.helpers import zoo_models
from tests.helpers.compiled import Vectorized, vectorized
from tests.helpers.grids import spread
from tests.helpers.passes import count_ops
from tests.helpers.transformed import run

BATCH = 3
METHODS: dict[str, Method] = {
    "moeca": MoECa(tau0=0.6),
    "branch forecast": policies.build("branch_forecast", order=1, margin=0.05),
    "sublayer forecast": policies.build("sublayer_forecast", order=1, share=0.3),
    "fora": policies.build("fora", interval=3),
    "output forecast": policies.build("forecast", order=1),
}
# Relative to the largest value of the prediction.
CLOSE: dict[CacheDtype, float] = {"bf16": 0.02, "fp8": 0.1}
# A routing that rounding changes replaces an expert; an extrapolation multiplies what it reads.
FP8_CLOSE = {"moeca": 0.2, "output forecast": 0.2}
VECTORS = {"attn", "key", "value", "feature", "shared", "ffn", "moe", "input"}


@cache
def _plain(dtype: CacheDtype | None) -> TransformedModel:
    return moeca_fx.transform(zoo_models.tiny_dsmoe(), zoo_models.inputs(), policy=None, cache_dtype=dtype)


@cache
def _run(name: str, dtype: CacheDtype | None) -> tuple[TransformedModel, list[torch.Tensor]]:
    fast = _plain(dtype).with_policy(METHODS[name])
    return fast, run(fast, list(zoo_models.trajectory(BATCH, drift=0.02)))


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("name", METHODS)
def test_results_are_close_to_those_of_an_exact_cache_and_not_equal(name: str, dtype: CacheDtype) -> None:
    _, exact = _run(name, None)
    fast, found = _run(name, dtype)
    assert torch.equal(found[0], exact[0]), "a full step stores and does not read"
    assert fast.stats().cached_steps > 0
    errors = [zoo_models.relative_error(a, b) for a, b in zip(found, exact, strict=True)]
    allowed = FP8_CLOSE.get(name, CLOSE["fp8"]) if dtype == "fp8" else CLOSE[dtype]
    assert 0 < max(errors) < allowed, errors


@pytest.mark.parametrize(("name", "dtype"), spread(list(METHODS), [None, "bf16", "fp8"]))
def test_memory_is_what_was_estimated(name: str, dtype: CacheDtype | None) -> None:
    fast, _ = _run(name, dtype)
    inputs = zoo_models.inputs()
    expected = moeca_fx.estimate_memory(
        zoo_models.tiny_dsmoe(), inputs, policy=METHODS[name], batch=BATCH, cache_dtype=dtype
    )
    assert fast.memory() == expected
    held = fast.cache()
    for state, tensor in held.items():
        kind = state.rpartition(".")[2].split("_")[0]
        vector = (kind in VECTORS or kind.startswith("value")) and not state.endswith("_scale")
        if not vector:
            assert tensor.dtype in (torch.float32, torch.int64), state
        elif dtype == "fp8":
            assert tensor.dtype == torch.float8_e4m3fn
            assert held[f"{state}_scale"].shape == tensor.shape[:-1] and held[f"{state}_scale"].dtype == torch.float32
        else:
            assert tensor.dtype == (torch.bfloat16 if dtype == "bf16" else torch.float32), state
    scales = [state for state in held if state.endswith("_scale")]
    assert bool(scales) == (dtype == "fp8")


@pytest.mark.parametrize("name", METHODS)
def test_every_option_makes_the_cache_smaller(name: str) -> None:
    sizes = [_run(name, dtype)[0].memory().total for dtype in (None, "bf16", "fp8")]
    assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_what_a_step_computes_is_rounded_to_bf16_and_not_to_fp8(dtype: CacheDtype) -> None:
    everything = MoECa(tau0=0, alpha=0, attention="full", dense_ffn="full")
    steps = list(zoo_models.trajectory(BATCH))
    exact, found = (run(_plain(kind).with_policy(everything), steps) for kind in (None, dtype))
    errors = [zoo_models.relative_error(have, want) for have, want in zip(found, exact, strict=True)]
    if dtype == "fp8":
        assert max(errors) < 1e-5
    else:
        assert errors[0] == 0, "a full step reads no cache"
        assert 1e-5 < max(errors) < 2**-8


# -- the graphs -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dsmoe() -> Vectorized:
    return vectorized(zoo_models.tiny_dsmoe(depth=4), zoo_models.inputs())


def test_without_a_storage_nothing_is_rewritten(dsmoe: Vectorized) -> None:
    graphs = dsmoe.graphs(MoECa())
    assert store_caches(graphs, None) is graphs


def test_a_model_in_bf16_has_nothing_to_gain_from_bf16() -> None:
    inputs = zoo_models.inputs(dtype=torch.bfloat16)
    found = vectorized(zoo_models.tiny_dsmoe().to(torch.bfloat16), inputs)
    graphs = found.graphs(MoECa())
    assert store_caches(graphs, find_storage("bf16")) is graphs
    assert store_caches(graphs, find_storage("fp8")).states != graphs.states


def test_writes_are_of_rows_and_stay_in_place(dsmoe: Vectorized) -> None:
    plain = dsmoe.graphs(MoECa())
    before, lowered = count_ops(plain.cached, rows.write_rows), lower_inplace(plain.cached)
    held = [state for state in plain.states if state.vector]
    graphs = store_caches(dsmoe.graphs(MoECa()), find_storage("fp8"))
    written = count_ops(graphs.cached, storage.write_codes)
    assert written == 14  # attention, keys and values of 3 sites, 2 features, 2 shared experts, 1 feed-forward
    assert count_ops(graphs.cached, rows.write_rows) == before, "a scale for every code, the rest as before"
    assert count_ops(graphs.cached, storage.encode_rows) == written
    assert count_ops(graphs.full, storage.encode_rows) == len(held)
    assert lower_inplace(graphs.cached) == lowered + written
    assert len(graphs.states) == len(plain.states) + len(held)


def test_caches_that_are_reused_as_they_are_pass_through(dsmoe: Vectorized) -> None:
    graphs = store_caches(dsmoe.graphs(policies.build("fora")), find_storage("fp8"))
    assert count_ops(graphs.cached, storage.encode_rows) == 0
    assert count_ops(graphs.cached, storage.decode_rows) == len(graphs.states) // 2


def test_a_forecast_of_branches_reads_and_corrects_rows_alone(dsmoe: Vectorized) -> None:
    method = policies.build("branch_forecast", order=1, attention="full")
    graphs = store_caches(dsmoe.graphs(method), find_storage("fp8"))
    cached, sites, terms = graphs.cached, 2, 2
    assert count_ops(cached, forecast.forecast_rows) == count_ops(cached, forecast.restart_rows) == 0
    # Of each term: rows for the forecast, and rows to correct.
    features = [n for n in cached.graph.nodes if n.target is storage.read_rows and "feature" in str(n.args[0])]
    assert len(features) == 2 * sites * terms
    assert count_ops(cached, forecast.restarted_rows) == sites * terms
    whole = [n for n in cached.graph.nodes if n.target is storage.decode_rows and "feature" in str(n.args[0])]
    assert whole == []


def test_bf16_is_read_as_it_was_written(dsmoe: Vectorized) -> None:
    graphs = store_caches(dsmoe.graphs(MoECa()), find_storage("bf16"))
    assert count_ops(graphs.cached, storage.decode_written) == 0
    writes = [n for n in graphs.cached.graph.nodes if n.target is rows.write_rows and "narrow" in str(n.args[2])]
    assert len(writes) == 14
    for write in writes:
        assert {user.target for user in write.users} <= {storage.decode_rows, "output"}


def test_what_is_known_of_a_value_stays_known(dsmoe: Vectorized) -> None:
    """Kernels are chosen by it; codes are not what they stand for."""
    exact = dsmoe.graphs(MoECa()).cached
    known = {node.name for node in exact.graph.nodes if example_value(node) is not None}
    cached = store_caches(dsmoe.graphs(MoECa()), find_storage("bf16")).cached
    dense = [node for node in cached.graph.nodes if node.target is storage.decode_rows and "attn_attn" in node.name]
    assert len(dense) > 0
    for node in dense:
        code = node.args[0]
        assert (example_value(node) is not None) == (node.name.removesuffix("_dense") in known)
        assert example_value(code) is None
    assert any(example_value(node) is not None for node in dense)


def test_a_second_run_changes_nothing(dsmoe: Vectorized) -> None:
    kept = find_storage("fp8")
    graphs = store_caches(dsmoe.graphs(MoECa()), kept)
    text = graph_text(graphs.cached)
    again = store_caches(graphs, kept)
    assert again is graphs and graph_text(again.cached) == text


# -- states and errors ------------------------------------------------------------------------------------------


def test_a_state_that_would_not_shrink_stays() -> None:
    fp8 = find_storage("fp8")
    short = StateSpec("a", "b", (3, 1), torch.float32, vector=True)
    assert stored(short, fp8) == (short,)  # one byte and a scale of four
    small = StateSpec("a", "weight", (3, 64), torch.float32)
    assert stored(small, fp8) == (small,)
    carried = StateSpec("a", "feature_1", (3, 64), torch.float32, carried=True, vector=True)
    code, scale = stored(carried, fp8)
    assert (scale.name, scale.shape, scale.carried) == ("a.feature_1_scale", (3,), True)
    assert code.bytes(2) + scale.bytes(2) == 2 * 3 * (64 + 4)


@pytest.mark.parametrize("function", ["transform", "estimate_memory", "inspect"])
@pytest.mark.parametrize("value", ["int8", "", 8, torch.bfloat16])
def test_unknown_storage(function: str, value: object) -> None:
    with pytest.raises(ConfigError, match=r"cache_dtype: expected None .*'bf16' or 'fp8', found .*pass one of these"):
        getattr(moeca_fx, function)(zoo_models.tiny_dsmoe(), zoo_models.inputs(), cache_dtype=value)
