"""HiDream from diffusers, unmodified: full steps equal, steps reuse, graphs are whole; both streams, any call."""

from typing import Any

import pytest
import torch
from torch import nn

import moeca_fx
from moeca_fx import MoECa, policies
from moeca_fx.errors import ExportError, UnsupportedModelError
from moeca_fx.export.plan import build_plan
from moeca_fx.policies import Method
from tests.helpers import hidream
from tests.helpers.hidream import SIZES, inputs, pair, sample, trajectory
from tests.helpers.whole_graphs import check_one_graph_a_step
from tests.policies.every import every_method, label

pytest.importorskip("diffusers", reason="HiDream comes with diffusers (pip install 'moeca_fx[peers]')")

pytestmark = pytest.mark.slow  # `make models`, which CI runs
SOME = MoECa()
SQUARE = SIZES["square"]
NAMES = list(SIZES)
TOLERANCE = 1e-5


def _close(have: torch.Tensor, want: torch.Tensor, tolerance: float = TOLERANCE) -> bool:
    return float((have - want).abs().max()) <= tolerance * float(want.abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_full_steps_are_equal_and_cached_steps_reuse(name: str) -> None:
    model, fast = pair(name, SOME)
    steps = trajectory(SIZES[name])
    with torch.no_grad():
        assert _close(sample(fast(**steps[0])), sample(model(**steps[0])))
        for kwargs in steps[1:]:
            have, want = sample(fast(**kwargs)), sample(model(**kwargs))
            assert not torch.equal(have, want) and _close(have, want, 0.1)
        fast.reset()
        last = fast(**steps[-1])  # what was reused before does not change a full step
        assert _close(sample(last), sample(model(**steps[-1])))
    stats = fast.stats()
    assert (stats.full_steps, stats.cached_steps) == (2, 3)
    assert 0 < stats.recomputed_branches < 0.7 * stats.branches
    assert stats.flops_executed < 0.8 * stats.flops_uncached


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", [policies.build("sublayer_forecast", share=1.0), None], ids=["all rows", "none"])
def test_steps_that_recompute_everything_are_equal(name: str, method: Method | None) -> None:
    """Row programs of every token and branch give what the model computes."""
    model, fast = pair(name, method)
    with torch.no_grad():
        for kwargs in trajectory(SIZES[name], steps=3):
            have, want = sample(fast(**kwargs)), sample(model(**kwargs))
            if method is None or not fast.stats().cached_steps:
                assert _close(have, want)
            else:  # attention alone is a forecast
                assert _close(have, want, 0.1)


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
            assert _close(have, sample(eager(**kwargs)), 1e-3)
            assert index or _close(have, sample(model(**kwargs)))
    assert "could not be compiled" not in caplog.text


@pytest.mark.parametrize("method", [pytest.param(method, id=label(method)) for method in every_method()])
def test_every_policy_runs_or_is_refused_for_a_reason(method: Method) -> None:
    model, plain = pair("square", None)
    refused = {
        "dbcache": "needs one stream through all blocks",
        "teacache": "needs one stream through all blocks",
        "toca": "expected a square token grid of even side, found 17 tokens",
        "duca": "expected a square token grid of even side, found 17 tokens",
    }
    if method.method in refused:
        with pytest.raises(UnsupportedModelError, match=refused[method.method]):
            plain.with_policy(method)
        return
    fast = plain.with_policy(method)
    with torch.no_grad():
        for kwargs in trajectory(SQUARE, steps=9):
            assert _close(sample(fast(**kwargs)), sample(model(**kwargs)), 0.6)
    stats = fast.stats()
    assert stats.cached_steps > 0 and stats.flops_executed < stats.flops_uncached


# -- what is found --------------------------------------------------------------------------------------------------


def test_inspect_names_sites_of_both_streams_and_gives_reasons() -> None:
    model, _ = pair("square", None)
    report = moeca_fx.inspect(model, (), inputs(SQUARE))
    double, single = "double_stream_blocks.0.block", "single_stream_blocks.0.block"
    assert [(site.path, site.kind, site.action) for site in report.sites] == [
        (f"{double}.attn1", "attention", "full"),
        (f"{double}.attn1_2", "attention", "full"),
        (f"{double}.ff_i", "moe", "rows"),
        (f"{double}.ff_t", "dense_ffn", "reuse"),
        (f"{single}.attn1", "attention", "synchronized"),
        (f"{single}.ff_i", "moe", "rows"),
    ]
    moe = report.sites[2]
    assert (moe.experts, moe.top_k, moe.router) == (4, 2, "softmax, top-2")
    assert moe.shared_expert == f"{double}.ff_i.shared_experts"
    said = "\n".join(report.warnings)
    assert "the batch size cannot be left open: its own code fixes the batch size" in said
    assert f"{double}.attn1: computed in full under a branch rule: joint attention over 33 tokens, of which" in said


def test_estimate_is_what_a_run_holds() -> None:
    model, fast = pair("square", SOME)
    with torch.no_grad():
        for kwargs in trajectory(SQUARE, steps=2):
            fast(**kwargs)
    estimated = moeca_fx.estimate_memory(model, (), inputs(SQUARE), policy=SOME)
    assert fast.memory().total == estimated.total > 0


# -- ways to call it ------------------------------------------------------------------------------------------------


def test_each_batch_size_is_traced_for_itself() -> None:
    model, fast = pair("square", SOME)
    with torch.no_grad():
        for batch in (2, 1, 2):
            for index, kwargs in enumerate(trajectory(SQUARE, batch, steps=2)):
                have, want = sample(fast(**kwargs)), sample(model(**kwargs))
                assert _close(have, want, 0.1 if index else TOLERANCE)
    assert sorted(program.batch or 0 for program in fast._moeca.programs.values()) == [1, 2]
    other = fast.with_policy("taylorseer")
    assert len(other._moeca.programs) == 2  # nothing is traced again
    with torch.no_grad():
        assert _close(sample(other(**inputs(SQUARE, 1))), sample(model(**inputs(SQUARE, 1))))


def test_chunks_cut_stacked_text_along_the_samples() -> None:
    """Two text layers and a batch of two: shapes alone do not tell which axis of [2, 2, S, H] the samples are on."""
    model, _ = pair("square", None)
    assert SQUARE.layers == 2
    fast = moeca_fx.transform(model, (), inputs(SQUARE), policy=SOME, chunk=1)
    with torch.no_grad():
        for index, kwargs in enumerate(trajectory(SQUARE, steps=2)):
            assert _close(sample(fast(**kwargs)), sample(model(**kwargs)), 0.1 if index else TOLERANCE)
    assert [program.batch for program in fast._moeca.programs.values()] == [1]


def test_results_keep_their_type() -> None:
    model, fast = pair("square", SOME)
    kwargs = inputs(SQUARE)
    with torch.no_grad():
        assert type(fast(**kwargs)) is type(model(**kwargs))
        found = fast(**kwargs, return_dict=False)
        assert isinstance(found, tuple) and _close(found[0], model(**kwargs).sample)
        assert isinstance(fast, type(model)) and fast.config == model.config


def test_positional_arguments_lists_of_layers_and_integer_timesteps() -> None:
    model, fast = pair("square", SOME)
    given = inputs(SQUARE)
    given["encoder_hidden_states_llama3"] = list(given["encoder_hidden_states_llama3"].unbind())  # type: ignore[assignment]
    given["timesteps"] = torch.tensor([700, 700])
    with torch.no_grad():
        assert _close(sample(fast(*given.values())), sample(model(*given.values())))


def test_inference_mode() -> None:
    model, fast = pair("square", SOME)
    with torch.inference_mode():
        for index, kwargs in enumerate(trajectory(SQUARE, steps=2)):
            assert _close(sample(fast(**kwargs)), sample(model(**kwargs)), 0.1 if index else TOLERANCE)


def test_half_precision() -> None:
    model = hidream.build(SQUARE, torch.bfloat16)

    def half(kwargs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: value if key == "timesteps" else value.bfloat16() for key, value in kwargs.items()}

    fast = moeca_fx.transform(model, (), half(inputs(SQUARE)), policy=SOME)
    with torch.no_grad():
        for index, kwargs in enumerate(map(half, trajectory(SQUARE, steps=3))):
            have, want = sample(fast(**kwargs)), sample(model(**kwargs))
            assert have.dtype == torch.bfloat16 and _close(have, want, 0.1 if index else 0.02)
    assert fast.stats().cached_steps == 2


def _packed(batch: int, sizes: object) -> dict[str, Any]:
    """Latents in patches, with their own positions, sizes and mask: two samples of different grids."""
    kwargs: dict[str, Any] = dict(inputs(SQUARE, batch))
    generator = torch.Generator().manual_seed(3)
    kwargs["hidden_states"] = torch.randn(batch, 16, 4 * hidream.CHANNELS, generator=generator)
    row, column = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    ids = torch.stack([torch.zeros(16), row.flatten(), column.flatten()], dim=-1)
    mask = torch.ones(batch, 16)
    mask[0, 8:] = 0.0
    return kwargs | {"img_ids": ids.expand(batch, 16, 3).clone(), "img_sizes": sizes, "hidden_states_masks": mask}


def test_positions_sizes_and_masks_given_by_the_caller() -> None:
    model, fast = pair("square", SOME)
    kwargs = _packed(2, [(4, 4), (4, 4)])
    with torch.no_grad():
        for index, shift in enumerate((0.0, 0.02)):
            step = kwargs | {
                "hidden_states": kwargs["hidden_states"] + shift,
                "timesteps": torch.full((2,), 900.0 - index),
            }
            assert _close(sample(fast(**step)), sample(model(**step)), 0.1 if index else TOLERANCE)


def test_sizes_in_a_tensor_are_an_input_like_any_other() -> None:
    """They depend on what the caller passes, so nothing of them may stay in the graph."""
    model, fast = pair("square", SOME)
    with torch.no_grad():
        for grid in ((4, 4), (2, 8), (8, 1)):
            kwargs = _packed(2, torch.tensor([grid, grid]))
            fast.reset()
            have, want = sample(fast(**kwargs)), sample(model(**kwargs))
            assert have.shape == want.shape and _close(have, want)
    assert len(fast._moeca.programs) == 2  # that of `pair`, and one for all grids


def test_export_needs_an_open_batch() -> None:
    _, fast = pair("square", SOME)
    with pytest.raises(ExportError, match=r"expected a model for any batch size.*its own code fixes the batch"):
        build_plan(fast)


# -- without weights ------------------------------------------------------------------------------------------------


def _on_meta(model: nn.Module, kwargs: dict[str, torch.Tensor]) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return model.to("meta"), {key: value.to("meta") for key, value in kwargs.items()}


@pytest.mark.parametrize("name", NAMES)
def test_on_the_meta_device_the_same_is_found(name: str) -> None:
    size = SIZES[name]
    wanted = moeca_fx.inspect(hidream.build(size), (), inputs(size))
    model, kwargs = _on_meta(hidream.build(size), inputs(size))
    found = moeca_fx.inspect(model, (), kwargs)
    assert found.sites == wanted.sites and found.refused == wanted.refused
    assert any("nothing was proven on data" in warning for warning in found.warnings)
    assert moeca_fx.estimate_memory(model, (), kwargs).total == found.cache_bytes == wanted.cache_bytes
    with pytest.raises(UnsupportedModelError, match="is on the meta device: expected weights"):
        moeca_fx.transform(model, (), kwargs)


def test_the_published_configuration_on_the_meta_device() -> None:
    from diffusers import HiDreamImageTransformer2DModel

    with torch.device("meta"):
        model = HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            num_layers=16,
            num_single_layers=32,
            attention_head_dim=128,
            num_attention_heads=20,
            caption_channels=[4096, 4096],
            text_emb_dim=2048,
            num_routed_experts=4,
            num_activated_experts=2,
            axes_dims_rope=(64, 32, 32),
            max_resolution=(128, 128),
            llama_layers=list(range(48)),
        ).eval()
        kwargs = {
            "hidden_states": torch.empty(1, 16, 16, 16),
            "timesteps": torch.empty(1),
            "encoder_hidden_states_t5": torch.empty(1, 16, 4096),
            "encoder_hidden_states_llama3": torch.empty(48, 1, 16, 4096),
            "pooled_embeds": torch.empty(1, 2048),
        }
    report = moeca_fx.inspect(model, (), kwargs)
    kinds = [site.kind for site in report.sites]
    assert {kind: kinds.count(kind) for kind in kinds} == {"attention": 16 * 2 + 32, "moe": 48, "dense_ffn": 16}
    assert all((site.experts, site.top_k) == (4, 2) for site in report.sites if site.kind == "moe")
    # Every branch's output of 64 image tokens (and 48 of text in the 32 single blocks) is kept: 2 x 2560 numbers.
    assert report.cache_bytes > 4 * 2 * 2560 * (16 * 64 + 32 * 96)
    assert "MiB" in str(report)
