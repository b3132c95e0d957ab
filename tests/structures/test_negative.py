"""What is no mixture of experts, or none that a cache can serve, is refused by name, and left as it was."""

import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

import moeca_fx
from moeca_fx.discover.behaviour import check_behaviour
from moeca_fx.discover.state import State
from moeca_fx.errors import MoecaError, NoMoEFoundError, UnsupportedModelError
from moeca_fx.proven_regions import find_regions
from tests.helpers import zoo_models
from tests.structures import negatives
from tests.structures.model import build
from tests.structures.negatives import Built, with_layer
from tests.structures.reasons import REASONS, reason_of
from tests.structures.sampling import sample

BATCH_MESSAGE = r"blocks\.0\.ffn: per-sample independence is lost"
REFUSED: dict[str, tuple[Callable[[], Built], type[MoecaError], str]] = {
    "dense": (
        negatives.dense,
        NoMoEFoundError,
        r"found no mixture-of-experts layer.*Looked at: blocks: .*(list of blocks|no router)",
    ),
    "unet": (negatives.unet, NoMoEFoundError, "found no mixture-of-experts layer.*no candidates"),
    "capacity over the batch": (partial(with_layer, negatives.BatchCapacity), UnsupportedModelError, BATCH_MESSAGE),
    "expert choice over the batch": (
        partial(with_layer, negatives.BatchExpertChoice),
        UnsupportedModelError,
        BATCH_MESSAGE,
    ),
    "logits normalised over the batch": (
        partial(with_layer, negatives.BatchMean),
        UnsupportedModelError,
        BATCH_MESSAGE,
    ),
    "logits normalised, batch of one": (
        partial(with_layer, negatives.BatchMean, 1),
        UnsupportedModelError,
        BATCH_MESSAGE,
    ),
    "two kinds of experts": (
        partial(with_layer, negatives.TwoKinds),
        NoMoEFoundError,
        r"blocks\.0\.ffn\.experts: 3 kinds of modules among 4; experts of one list may differ in the values",
    ),
    "noisy gate": (
        partial(with_layer, negatives.NoisyGate),
        UnsupportedModelError,
        r"blocks\.0\.ffn: draws random numbers in eval mode .*noisy gate",
    ),
    "dropout left on": (
        partial(with_layer, negatives.Dropout),
        UnsupportedModelError,
        r"blocks\.0\.ffn\.experts\.0: draws random numbers in eval mode .*dropout is left on",
    ),
    "experts that count": (
        partial(with_layer, negatives.Stateful),
        UnsupportedModelError,
        r"blocks\.0\.ffn\.experts\.0\.seen, .*written by forward in eval mode",
    ),
    "a bias that follows the load": (
        partial(with_layer, negatives.MovingBias),
        UnsupportedModelError,
        r"blocks\.0\.ffn\.bias, blocks\.1\.ffn\.bias: written by forward",
    ),
    "a layer that counts its calls": (
        partial(with_layer, negatives.NumberOfCalls),
        UnsupportedModelError,
        r"blocks\.0\.ffn\.calls, blocks\.1\.ffn\.calls: written by forward",
    ),
    "causal language model": (
        negatives.language_model,
        UnsupportedModelError,
        "LanguageModel: a causal language model",
    ),
    "causal language model, one text": (
        partial(negatives.language_model, 1),
        UnsupportedModelError,
        "LanguageModel: a causal language model",
    ),
}


def _values(model: nn.Module) -> dict[str, object]:
    numbers = {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, int | float)
    }
    return {**numbers, **{name: value.clone() for name, value in model.state_dict().items()}}


@pytest.mark.parametrize(("make", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_by_name_and_left_as_it_was(make: Callable[[], Built], error: type[MoecaError], message: str) -> None:
    model, args, kwargs = make()
    before = _values(model)
    with pytest.raises(error, match=message) as caught:
        moeca_fx.transform(model, args, kwargs)
    assert reason_of(caught.value) is not None, "undocumented"
    after = _values(model)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]) if isinstance(value, torch.Tensor) else value == after[name], name
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_every_reason_has_a_code_of_its_own() -> None:
    assert len(set(map(str, REASONS))) == len(REASONS)
    assert all(reason.meaning and reason.advice for reason in REASONS)


def test_dropout_in_training_mode_is_named() -> None:
    model, args, kwargs = with_layer(negatives.Plain)
    model.blocks[1].attn.add_module("dropout", nn.Dropout(0.1))
    with pytest.raises(UnsupportedModelError, match=r"blocks\.1\.attn\.dropout: in training mode"):
        moeca_fx.transform(model, args, kwargs)


def test_the_plain_layer_is_transformed_after_three_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, args, kwargs = with_layer(negatives.Plain)
    runs = []
    forward = type(model).forward

    def counted(self: nn.Module, *args: object, **kwargs: object) -> object:
        runs.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", counted)
    found = find_regions(model, args, kwargs)
    assert [region.path for region in found.regions] == ["blocks.0.ffn", "blocks.1.ffn"]
    assert len(runs) <= 3


@pytest.mark.parametrize("index", range(0, 420, 20))
@pytest.mark.parametrize("batch", [1, 2])
def test_independent_samples_raise_no_alarm(index: int, batch: int) -> None:
    model, args, kwargs = build(sample()[index], index, batch)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        check_behaviour(model, args, kwargs, model(*args, **kwargs), State(model))


@pytest.mark.parametrize("family", zoo_models.FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_zoo_raises_no_alarm(family: zoo_models.Family, dtype: torch.dtype) -> None:
    model, inputs = zoo_models.tiny(family).to(dtype), zoo_models.inputs(dtype=dtype)
    with torch.no_grad():
        check_behaviour(model, inputs, {}, model(*inputs), State(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer", [negatives.BatchCapacity, negatives.BatchExpertChoice, negatives.BatchMean])
def test_mixing_is_seen_in_every_dtype(layer: type[nn.Module], dtype: torch.dtype) -> None:
    model, (x, t, y), _ = with_layer(layer)
    model, args = model.to(dtype), (x.to(dtype), t.to(dtype), y)
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match="per-sample independence is lost"):
        check_behaviour(model, args, {}, model(*args), State(model))
