"""A policy on a pipeline and off again: what stays as it was, what follows the pipeline, and what is refused."""

import copy
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTPipeline
from torch import Tensor, nn

import moeca_fx
from moeca_fx.errors import ConfigError, NoMoEFoundError, UnsupportedModelError
from tests.helpers.pipelines import TextPipeline, TinyMoE, dit_pipeline, text_pipeline, tiny_moe
from tests.helpers.requests import SOME, draw, write


def _state(pipe: Any) -> tuple[Any, ...]:
    parts = [vars(part) for part in (pipe.transformer, pipe.scheduler)]
    return (
        type(pipe),
        dict(vars(pipe)),
        [type(part) for part in pipe.components.values()],
        [list(part) for part in parts],
    )


def test_without_reuse_the_images_are_the_plain_pipelines() -> None:
    pipe = dit_pipeline(num_layers=2)
    expected = [draw(pipe), draw(pipe, guidance_scale=1.0, labels=(3, 4, 5))]
    moeca_fx.apply(pipe, policy=None)
    found = [draw(pipe), draw(pipe, guidance_scale=1.0, labels=(3, 4, 5))]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (moeca_fx.stats(pipe).full_steps, moeca_fx.stats(pipe).cached_steps) == (12, 0)


def test_without_reuse_separate_guidance_is_the_plain_pipelines() -> None:
    pipe = text_pipeline()
    expected = write(pipe, batch=2)
    torch.testing.assert_close(write(moeca_fx.apply(pipe, policy=None), batch=2), expected, rtol=1e-5, atol=1e-5)


def test_remove_restores_everything() -> None:
    pipe = dit_pipeline()
    expected = draw(pipe)
    before, model = _state(pipe), pipe.transformer
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    assert moeca_fx.apply(pipe, SOME) is pipe
    assert not torch.equal(draw(pipe), expected)
    shown = pipe.transformer
    assert moeca_fx.remove(pipe) is pipe
    assert _state(pipe) == before and pipe.transformer is model
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(draw(pipe), expected)
    inputs = (torch.randn(2, 4, 4, 4), torch.tensor([5.0, 5.0]), torch.tensor([1, 2]))
    assert torch.equal(shown(*inputs).sample, model(*inputs).sample)  # who kept the stand-in has the model


def test_the_pipeline_looks_as_before() -> None:
    pipe = dit_pipeline()
    model, config, call = pipe.transformer, dict(pipe.config), inspect.signature(pipe.__call__)
    forward = inspect.signature(model.forward)
    moeca_fx.apply(pipe, SOME)
    assert type(pipe) is not DiTPipeline and isinstance(pipe, DiTPipeline) and isinstance(pipe.transformer, TinyMoE)
    assert (type(pipe).__name__, type(pipe).__module__) == (DiTPipeline.__name__, DiTPipeline.__module__)
    assert (type(pipe.transformer).__name__, type(pipe.transformer).__module__) == ("TinyMoE", TinyMoE.__module__)
    assert pipe.config == config and inspect.signature(pipe.__call__) == call
    assert inspect.signature(pipe.transformer.forward) == forward
    assert pipe.transformer.config is model.config and pipe.transformer.enter is model.enter
    assert set(pipe.components) == {"transformer", "vae", "scheduler"}
    assert pipe.device == model.device and pipe.dtype == model.dtype
    pipe.register_modules(vae=pipe.vae, transformer=pipe.transformer)
    assert pipe.config == config


def test_outside_of_requests_the_model_runs_as_it_is() -> None:
    pipe = dit_pipeline()
    model = pipe.transformer
    moeca_fx.apply(pipe, SOME)
    draw(pipe)
    calls = moeca_fx.stats(pipe)
    inputs = (torch.randn(2, 4, 4, 4), torch.tensor([5.0, 5.0]), torch.tensor([1, 2]))
    assert torch.equal(pipe.transformer(*inputs).sample, model(*inputs).sample)
    with pipe.transformer.cache_context("cond"):
        assert torch.equal(pipe.transformer(*inputs).sample, model(*inputs).sample)
    assert moeca_fx.stats(pipe) == calls


def test_save_pretrained_before_and_after_the_first_request(tmp_path: Path) -> None:
    pipe = dit_pipeline()
    weights = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    pipe.save_pretrained(tmp_path / "plain")
    moeca_fx.apply(pipe, SOME)
    pipe.save_pretrained(tmp_path / "before")
    draw(pipe)
    pipe.save_pretrained(tmp_path / "after")
    index = (tmp_path / "plain" / "model_index.json").read_text()
    for folder in (tmp_path / "before", tmp_path / "after"):
        assert (folder / "model_index.json").read_text() == index
        again = TinyMoE.from_pretrained(folder / "transformer").state_dict()
        assert again.keys() == weights.keys()
        assert all(torch.equal(value, weights[name]) for name, value in again.items())


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))], ids=["copy", "pickle"]
)
def test_a_copy_is_the_plain_pipeline(copied: Callable[[Any], Any]) -> None:
    pipe = text_pipeline()
    expected = write(pipe)
    moeca_fx.apply(pipe, SOME)
    write(pipe)
    twin = copied(pipe)
    assert type(twin) is TextPipeline and type(twin.transformer) is TinyMoE
    assert twin.transformer.enter is not pipe.transformer.enter
    assert torch.equal(write(twin), expected)
    assert type(copied(pipe.transformer)) is TinyMoE
    moeca_fx.apply(twin, SOME)
    assert torch.equal(write(twin), write(pipe))


def test_another_dtype_after_apply_moves_the_model() -> None:
    pipe = text_pipeline()
    model = pipe.transformer
    moeca_fx.apply(pipe, SOME)
    pipe.to(torch.float64)  # before the first request
    wide = write(
        pipe, prompt_embeds=torch.ones(1, 5, 16).double(), negative_prompt_embeds=torch.zeros(1, 5, 16).double()
    )
    assert wide.dtype == torch.float64 == model.dtype
    pipe.to(torch.float32)  # and after it
    assert model.dtype == torch.float32
    found = write(pipe)
    assert moeca_fx.stats(pipe).cached_steps == 8  # counted anew
    moeca_fx.remove(pipe)
    assert torch.equal(found, write(moeca_fx.apply(text_pipeline(), SOME)))
    assert pipe.transformer is model


def _halve(image: Tensor) -> Tensor:
    return image / 2


def test_new_weights_and_modules_are_seen() -> None:
    pipe, other = text_pipeline(), tiny_moe(seed=5)
    moeca_fx.apply(pipe, policy=None)
    write(pipe)
    pipe.transformer.load_state_dict(other.state_dict())  # in place: shared
    expected = write(TextPipeline(transformer=other, scheduler=pipe.scheduler))
    torch.testing.assert_close(write(pipe), expected, rtol=1e-5, atol=1e-5)
    other.leave = nn.Sequential(other.leave, nn.Tanh()).eval()
    pipe.transformer.leave = other.leave  # a module is exchanged, as adapters do
    expected = write(TextPipeline(transformer=other, scheduler=pipe.scheduler))
    torch.testing.assert_close(write(pipe), expected, rtol=1e-5, atol=1e-5)
    pipe.transformer.finish = other.finish = _halve  # what is called and no module, as attention processors are
    torch.testing.assert_close(write(pipe), write(TextPipeline(transformer=other, scheduler=pipe.scheduler)))
    assert not torch.allclose(write(pipe), expected)


def test_a_dense_denoiser_is_refused_in_the_first_request_and_given_back() -> None:
    pipe = text_pipeline(dense=True)
    expected = write(pipe)
    moeca_fx.apply(pipe, SOME)
    for _ in range(2):
        with pytest.raises(NoMoEFoundError, match="TinyMoE: found no mixture-of-experts layer"):
            write(pipe)
    assert moeca_fx.stats(pipe).full_steps == 0
    assert torch.equal(write(moeca_fx.remove(pipe)), expected)


def test_misuse_is_told() -> None:
    pipe = text_pipeline()
    with pytest.raises(ConfigError, match=r"remove: no policy is applied to this TextPipeline.*moeca_fx\.apply"):
        moeca_fx.remove(pipe)
    with pytest.raises(ConfigError, match="stats: no policy is applied"):
        moeca_fx.stats(pipe)
    with pytest.raises(ConfigError, match=r"expected a diffusers pipeline.*found TinyMoE.*moeca_fx\.transform"):
        moeca_fx.apply(pipe.transformer)
    with pytest.raises(ConfigError, match="expected a module named 'prior' among its components, found transformer"):
        moeca_fx.apply(pipe, denoiser="prior")
    with pytest.raises(ConfigError, match="policy"):
        moeca_fx.apply(pipe, policy="no such policy")
    with pytest.raises(ConfigError, match="chunk"):
        moeca_fx.apply(pipe, chunk=0)
    assert type(pipe) is TextPipeline and type(pipe.transformer) is TinyMoE
    moeca_fx.apply(pipe, denoiser="transformer")
    with pytest.raises(ConfigError, match=r"a policy is applied to this pipeline already; call moeca_fx\.remove"):
        moeca_fx.apply(pipe)


def test_a_replaced_denoiser_is_not_passed_over_in_silence() -> None:
    pipe, other = text_pipeline(), tiny_moe(seed=3)
    moeca_fx.apply(pipe, SOME)
    pipe.transformer = other
    with pytest.raises(ConfigError, match=r"TextPipeline\.transformer was replaced since apply"):
        write(pipe)
    moeca_fx.remove(pipe)
    assert pipe.transformer is other
    write(moeca_fx.apply(pipe, SOME))


def _hook_like_accelerate(module: Any) -> None:
    """What `accelerate.hooks.add_hook_to_module` leaves on a module."""
    module._hf_hook, module._old_forward = object(), module.forward
    module.forward = lambda *args, **kwargs: module._old_forward(*args, **kwargs)


def _unhook(module: Any) -> None:
    for name in ("_hf_hook", "_old_forward", "forward"):
        del vars(module)[name]


@pytest.mark.parametrize("path", ["", "storeys.0"], ids=["model offload", "sequential offload"])
def test_offloading_is_refused_before_and_after_apply(path: str) -> None:
    pipe = text_pipeline()
    part = pipe.transformer.get_submodule(path)
    _hook_like_accelerate(part)
    expected = write(pipe)
    with pytest.raises(UnsupportedModelError, match=r"TextPipeline\.transformer: accelerate .*remove_all_hooks"):
        moeca_fx.apply(pipe, SOME)
    _unhook(part)
    moeca_fx.apply(pipe, SOME)
    good = write(pipe)
    hooked = pipe.transformer.get_submodule(path)
    _hook_like_accelerate(hooked)
    with pytest.raises(UnsupportedModelError, match="accelerate moves its weights"):
        write(pipe)
    _unhook(hooked)
    assert torch.equal(write(pipe), good)
    assert torch.equal(write(moeca_fx.remove(pipe)), expected)


def test_other_states_are_refused_by_name() -> None:
    pipe = text_pipeline()
    moeca_fx.apply(pipe, SOME)
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    with pytest.raises(UnsupportedModelError, match="diffusers' own hooks are on"):
        write(pipe)
    pipe = text_pipeline()
    pipe.transformer.train()
    with pytest.raises(UnsupportedModelError, match="in training mode"):
        moeca_fx.apply(pipe, SOME)
    pipe.transformer.eval()
    moeca_fx.apply(pipe, SOME)
    pipe.transformer.compile()
    with pytest.raises(UnsupportedModelError, match="was compiled in place"):
        write(pipe)


def test_requests_under_autocast_and_without() -> None:
    plain = text_pipeline()
    pipe = moeca_fx.apply(text_pipeline(), None)
    for enabled in (False, True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found, want = write(pipe), write(plain)
        assert float((found - want).abs().max() / want.abs().max()) <= (0.05 if enabled else 1e-4)
    assert len(pipe.transformer._moeca_denoiser.fast._moeca.programs) == 2


def test_inference_mode_gives_the_same() -> None:
    pipe = moeca_fx.apply(text_pipeline(), SOME)
    with torch.inference_mode():
        found = write(pipe)
    assert torch.equal(found, write(pipe))
    assert moeca_fx.stats(pipe).cached_steps == 16
