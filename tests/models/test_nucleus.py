"""Nucleus from diffusers, unmodified: experts that choose their tokens, stacked in parameters; any call of it."""

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import moeca_fx
from moeca_fx import MoECa, policies
from moeca_fx.discover import discover
from moeca_fx.errors import UnsupportedModelError
from moeca_fx.policies import Method
from moeca_fx.runtime.module import TransformedModel
from tests.helpers import nucleus
from tests.helpers.nucleus import SIZES, inputs, pair, sample, trajectory
from tests.helpers.whole_graphs import check_one_graph_a_step
from tests.policies.every import every_method, label

pytest.importorskip("diffusers", reason="Nucleus comes with diffusers (pip install 'moeca_fx[peers]')")

pytestmark = pytest.mark.slow  # `make models`, which CI runs
SOME = MoECa()
KEYS, SIGMOID = SIZES["shared keys"], SIZES["sigmoid"]
NAMES = list(SIZES)
TOLERANCE = 1e-5


def _error(have: torch.Tensor, want: torch.Tensor) -> float:
    return float((have - want).abs().max()) / float(want.abs().max())


def _check_run(model: nn.Module, fast: TransformedModel, steps: list[dict[str, Any]]) -> None:
    """The full step is equal; the next is an approximation, nearer to the model than to hold its last prediction."""
    with torch.no_grad():
        first, second = sample(model(**steps[0])), sample(model(**steps[1]))
        assert _error(sample(fast(**steps[0])), first) <= TOLERANCE
        found = _error(sample(fast(**steps[1])), second)
    assert 0 < found < 0.8 * _error(first, second)


# Both ways to run the experts at each size with `make slow`: a trace takes seconds.
EXPERTS = [
    *(pytest.param(name, False, id=f"{name}-loop") for name in NAMES),
    pytest.param("sigmoid", True, id="sigmoid-grouped_mm"),
    *(pytest.param(name, True, id=f"{name}-grouped_mm", marks=pytest.mark.slow) for name in NAMES if name != "sigmoid"),
]


@pytest.mark.parametrize(("name", "grouped"), EXPERTS)
def test_full_steps_are_equal_and_cached_steps_reuse(name: str, grouped: bool) -> None:
    model, fast = pair(name, SOME, grouped)
    steps = trajectory(SIZES[name])
    _check_run(model, fast, steps)
    with torch.no_grad():
        for kwargs in steps[2:]:
            fast(**kwargs)
        fast.reset()
        last = fast(**steps[-1])  # what was reused before does not change a full step
        assert _error(sample(last), sample(model(**steps[-1]))) <= TOLERANCE
    stats = fast.stats()
    assert (stats.full_steps, stats.cached_steps) == (2, 3)
    assert 0 < stats.recomputed_branches < 0.7 * stats.branches
    assert stats.flops_executed < stats.flops_uncached


@pytest.mark.parametrize("name", ["sigmoid", *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[::2])])
def test_padded_text_is_masked(name: str) -> None:
    model, fast = pair(name, SOME, masked=True)
    steps = trajectory(SIZES[name], steps=2, masked=True)
    _check_run(model, fast, steps)
    hidden = steps[0] | {"encoder_hidden_states": steps[0]["encoder_hidden_states"].clone()}
    hidden["encoder_hidden_states"][0, -2:] += 1.0
    with torch.no_grad():
        for fresh in (steps[0], hidden):
            fast.reset()
            assert _error(sample(fast(**fresh)), sample(model(**steps[0]))) <= TOLERANCE


def test_a_cached_step_that_recomputes_every_branch_is_the_model() -> None:
    """Attention is computed in full, no block is dense, every token is chosen: nothing is left to differ."""
    size = replace(SIGMOID, capacity=3.0)  # a token that no expert chose keeps the feature of its shared expert
    model = nucleus.build(size)
    every = policies.build("branch_forecast", select="score_budget", share=1.0, attention="full")
    fast = moeca_fx.transform(model, (), inputs(size), policy=every)
    with torch.no_grad():
        for kwargs in trajectory(size):
            assert _error(sample(fast(**kwargs)), sample(model(**kwargs))) <= TOLERANCE
    stats = fast.stats()
    assert stats.cached_steps > 0 and stats.recomputed_branches == stats.branches > 0


@pytest.mark.parametrize("method", [pytest.param(method, id=label(method)) for method in every_method()])
def test_every_policy_runs_or_is_refused_for_a_reason(method: Method) -> None:
    model, plain = pair("shared keys", None)
    options = method.as_dict()
    refused = None
    if method.method in ("toca", "duca") or (method.method == "sublayer_forecast" and options["share"]):
        refused = "its experts choose among all tokens of a sample, so one token cannot be routed alone"
    elif options.get("margin") is not None:
        refused = "its experts choose their tokens, so a cached branch that stays for a new one would serve"
    if refused is not None:
        with pytest.raises(UnsupportedModelError, match=refused):
            plain.with_policy(method)
        return
    fast = plain.with_policy(method)
    with torch.no_grad():
        for index, kwargs in enumerate(trajectory(KEYS, steps=9)):
            found = sample(fast(**kwargs))
            assert torch.isfinite(found).all() and (index or _error(found, sample(model(**kwargs))) <= TOLERANCE)
    stats = fast.stats()
    assert stats.cached_steps > 0 and stats.flops_executed < stats.flops_uncached


# -- what is found --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_regions(name: str) -> None:
    size = SIZES[name]
    found = discover(pair(name, None)[0], (), inputs(size))
    assert [region.path for region in found.regions] == [f"transformer_blocks.{layer}.img_mlp" for layer in size.moe]
    tokens = size.grid[0] * size.grid[1]
    assert [region.top_k for region in found.regions] == [size.slots(layer, tokens) for layer in size.moe]
    assert all(region.layout == "expert" and region.num_experts == size.experts for region in found.regions)
    assert all(region.form is not None and region.error < TOLERANCE for region in found.regions)
    assert not any(refusal.is_moe for refusal in found.refused)


def test_one_sample_is_enough() -> None:
    """The pipeline calls it with one; reshapes of a single sample are views, those of two are copies."""
    model, _ = pair("sigmoid", None)
    wanted, found = (discover(model, (), inputs(SIGMOID, batch)).regions for batch in (2, 1))
    assert [replace(region, error=0.0) for region in found] == [replace(region, error=0.0) for region in wanted]


def test_many_experts_are_proven_in_seconds() -> None:
    """A loop over 64 experts leaves values by the hundred; before they were sorted out this took minutes."""
    layer = nucleus.build(replace(SIGMOID, experts=64, capacity=8.0, layers=1)).get_submodule("transformer_blocks.0")
    rows, mood = torch.randn(2, 16, 32), torch.randn(2, 32)
    rotary = tuple(torch.polar(torch.ones(count, 8), torch.zeros(count, 8)) for count in (16, nucleus.PROMPT))
    begin = time.process_time()
    (region,) = discover(layer, (rows, torch.randn(2, nucleus.PROMPT, nucleus.TEXT), mood, rotary), {}).regions
    assert region.num_experts == 64 and region.error < TOLERANCE
    assert time.process_time() - begin < 60


def test_inspect_names_sites_and_gives_reasons() -> None:
    model, _ = pair("shared keys", None)
    report = moeca_fx.inspect(model, (), inputs(KEYS))
    blocks = [f"transformer_blocks.{index}" for index in range(3)]
    assert [(site.path, site.kind, site.action) for site in report.sites] == [
        (f"{blocks[0]}.attn", "attention", "full"),
        (f"{blocks[0]}.img_mlp.net", "dense_ffn", "reuse"),
        (f"{blocks[1]}.attn", "attention", "full"),
        (f"{blocks[1]}.img_mlp", "moe", "rows"),
        (f"{blocks[2]}.attn", "attention", "full"),
        (f"{blocks[2]}.img_mlp", "moe", "rows"),
    ]
    moe = report.sites[3]
    assert (moe.experts, moe.top_k) == (4, 8)
    assert moe.router == "expert choice, softmax, top-8, renormalised, scaled by 2.5"
    assert moe.shared_expert == f"{blocks[1]}.img_mlp.shared_expert.net"
    assert "each expert takes its tokens from all of a sample" in "\n".join(report.warnings)


def test_estimate_is_what_a_run_holds() -> None:
    model, fast = pair("shared keys", SOME)
    with torch.no_grad():
        for kwargs in trajectory(KEYS, steps=2):
            fast(**kwargs)
    estimated = moeca_fx.estimate_memory(model, (), inputs(KEYS), policy=SOME)
    assert dict(fast.memory().states) == dict(estimated.states)
    assert fast.memory().total == estimated.total > 0


# -- ways to call it ------------------------------------------------------------------------------------------------


def test_other_image_sizes_and_batches() -> None:
    """Experts take other numbers of tokens there: 8, 6 and 10 of each sample."""
    model, fast = pair("shared keys", SOME)
    for grid, batch in (((4, 4), 1), ((6, 2), 3), ((4, 5), 2), ((4, 4), 2)):
        _check_run(model, fast, trajectory(KEYS, batch, grid=grid))
    moe = [program.sites.moe[0] for program in fast._moeca.programs.values()]
    assert {(site.tokens, site.top_k) for site in moe} == {(16, 8), (12, 6), (20, 10)}
    report = moeca_fx.inspect(model, (), inputs(KEYS, grid=(6, 2)))
    assert [site.top_k for site in report.sites if site.kind == "moe"] == [6, 6]


def test_the_original_stays_as_it_was() -> None:
    """It keeps rotary positions from call to call; none of a trace may be among them."""
    model, untouched = nucleus.build(KEYS), nucleus.build(KEYS)
    attributes = {path: sorted(vars(module)) for path, module in model.named_modules()}
    fast = moeca_fx.transform(model, (), inputs(KEYS), policy=SOME)
    with torch.no_grad():
        for grid in ((4, 4), (7, 2), (4, 4)):
            kwargs = inputs(KEYS, grid=grid)
            fast.reset()
            assert _error(sample(fast(**kwargs)), sample(untouched(**kwargs))) <= TOLERANCE
            assert torch.equal(sample(model(**kwargs)), sample(untouched(**kwargs)))
    assert {path: sorted(vars(module)) for path, module in model.named_modules()} == attributes
    # Bound to the weights of the model that it came from: nothing was copied.
    shared = {parameter.data_ptr() for parameter in model.parameters()}
    assert shared >= {parameter.data_ptr() for name, parameter in fast.named_parameters() if "experts" in name}


def test_results_keep_their_type() -> None:
    model, fast = pair("shared keys", SOME)
    kwargs = inputs(KEYS)
    with torch.no_grad():
        assert type(fast(**kwargs)) is type(model(**kwargs))
        found = fast(**kwargs, return_dict=False)
        assert isinstance(found, tuple) and _error(found[0], model(**kwargs).sample) <= TOLERANCE
        order = ("hidden_states", "img_shapes", "encoder_hidden_states")
        found = fast(*(kwargs[name] for name in order), None, kwargs["timestep"], attention_kwargs={"scale": 1.0})
        assert _error(found.sample, model(**kwargs).sample) <= TOLERANCE
    assert isinstance(fast, type(model)) and fast.config == model.config  # type: ignore[attr-defined]  # of diffusers


def _half(kwargs: dict[str, Any]) -> dict[str, Any]:
    half = pytree.tree_map_only(torch.Tensor, torch.Tensor.bfloat16, kwargs)
    return half | {"timestep": kwargs["timestep"]}  # it moves by less than bf16 can tell apart


@pytest.mark.parametrize("grouped", [False, True], ids=["loop", "grouped_mm"])
def test_half_precision(grouped: bool) -> None:
    model = nucleus.build(SIGMOID, grouped).bfloat16()
    steps = [_half(kwargs) for kwargs in trajectory(SIGMOID, steps=3)]
    fast = moeca_fx.transform(model, (), steps[0], policy=SOME)
    with torch.no_grad():
        for index, kwargs in enumerate(steps):
            have, want = sample(fast(**kwargs)), sample(model(**kwargs))
            assert have.dtype == torch.bfloat16 and _error(have, want) <= (0.2 if index else 0.02)
    assert fast.stats().cached_steps == 2


# -- compilation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_step_is_one_graph(name: str) -> None:
    _, fast = pair(name, SOME)
    check_one_graph_a_step(fast, inputs(SIZES[name]))


@pytest.mark.parametrize("name", NAMES)
def test_compiled(name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("MOECA_FX_COMPILE", "1")
    model, plain = pair(name, None)
    fast, eager = plain.with_policy(SOME, compile=True), plain.with_policy(SOME, compile=False)
    with torch.no_grad():
        for index, kwargs in enumerate(trajectory(SIZES[name])):
            have = sample(fast(**kwargs))
            assert _error(have, sample(eager(**kwargs))) <= 1e-3
            assert index or _error(have, sample(model(**kwargs))) <= TOLERANCE
    assert "could not be compiled" not in caplog.text


# -- without weights ------------------------------------------------------------------------------------------------


def _to_meta(kwargs: dict[str, Any]) -> dict[str, Any]:
    return pytree.tree_map_only(torch.Tensor, lambda leaf: leaf.to("meta"), kwargs)


@pytest.mark.parametrize("grouped", [False, True], ids=["loop", "grouped_mm"])
@pytest.mark.parametrize("name", NAMES)
def test_on_the_meta_device_the_same_is_found(name: str, grouped: bool) -> None:
    size = SIZES[name]
    wanted = moeca_fx.inspect(nucleus.build(size, grouped), (), inputs(size, 1))
    model, kwargs = nucleus.build(size, grouped).to("meta"), _to_meta(inputs(size, 1))
    found = moeca_fx.inspect(model, (), kwargs)
    assert found.sites == wanted.sites and found.refused == wanted.refused and found.flops == wanted.flops
    assert any("nothing was proven on data" in warning for warning in found.warnings)
    assert moeca_fx.estimate_memory(model, (), kwargs).total == found.cache_bytes == wanted.cache_bytes
    with pytest.raises(UnsupportedModelError, match="is on the meta device: expected weights"):
        moeca_fx.transform(model, (), kwargs)


# Of the released weights (17 B parameters), and what the class has without arguments (23 B).
CONFIGURATIONS: dict[str, tuple[dict[str, Any], dict[str, int], int]] = {
    "released": (
        {
            "out_channels": 16,
            "num_layers": 32,
            "num_key_value_heads": 4,
            "joint_attention_dim": 4096,
            "dense_moe_strategy": "leave_first_three_blocks_dense",
            "num_experts": 64,
            "capacity_factors": [0.0] * 3 + [4.0] * 2 + [2.0] * 27,
            "use_grouped_mm": True,
        },
        {"attention": 32, "dense_ffn": 3, "moe": 29},
        2,
    ),
    "defaults of the class": ({}, {"attention": 24, "dense_ffn": 4, "moe": 20}, 1),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_published_configuration_on_the_meta_device(name: str) -> None:
    from diffusers import NucleusMoEImageTransformer2DModel

    config, counts, structures = CONFIGURATIONS[name]
    side = 16
    with torch.device("meta"):
        model = NucleusMoEImageTransformer2DModel(**config).eval()
        kwargs = {
            "hidden_states": torch.empty(1, side * side, 64),
            "img_shapes": [(1, side, side)],
            "encoder_hidden_states": torch.empty(1, 32, model.config.joint_attention_dim),
            "timestep": torch.empty(1),
        }
    report = moeca_fx.inspect(model, (), kwargs)
    kinds = [site.kind for site in report.sites]
    assert {kind: kinds.count(kind) for kind in sorted(set(kinds))} == counts
    moe = [site for site in report.sites if site.kind == "moe"]
    factors = config.get("capacity_factors", [8.0] * 24)
    layers = [int(site.path.split(".")[1]) for site in moe]
    experts = model.config.num_experts
    assert [(site.experts, site.top_k) for site in moe] == [
        (experts, -int(-factors[layer] * side * side // experts)) for layer in layers
    ]
    # Each branch's output of 2048 numbers is kept, in fp32.
    assert report.cache_bytes > 4 * 2048 * sum(experts * site.top_k for site in moe if site.top_k)
    said = next(warning for warning in report.warnings if "nothing was proven on data" in warning)
    assert said.count("img_mlp, for") == structures and "MiB" in str(report)


def test_a_layer_of_published_width_is_proven_in_seconds_and_one_percent_is_caught() -> None:
    """128 experts of 2048 x 1344; every activation and order of halves reads 4 GB unless they share their products."""
    for boost, proven in ((1.0, True), (1.01, False)):
        layer = nucleus.published_layer(boost)
        begin = time.process_time()
        found = discover(layer, nucleus.rows_for(layer, 64), {})
        assert bool(found.regions) == proven and time.process_time() - begin < 300
        assert proven or found.refused[-1].is_moe
