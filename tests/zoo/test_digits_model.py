"""The shipped digits model: its size, its router, and digits that a classifier of real ones recognises."""

import pytest
import torch

from moeca_fx.zoo import build
from moeca_fx.zoo.digits.classifier import accuracy
from moeca_fx.zoo.digits.config import WEIGHTS
from moeca_fx.zoo.dsmoe import MoELayer
from moeca_fx.zoo.sampling import noise_and_labels, sample
from moeca_fx.zoo.training.measure import Draw, draw, portray_held_out
from moeca_fx.zoo.training.portrait import find_classifier, portray
from moeca_fx.zoo.training.task import DIGITS


@pytest.fixture(scope="module")
def model():
    return build("digits")


def test_the_file_is_small_and_the_weights_load_in_full_precision(model):
    assert WEIGHTS.stat().st_size <= 8_000_000
    assert sum(p.numel() for p in model.parameters()) >= 2_000_000
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    assert not model.training


def test_every_expert_of_every_layer_is_used(model):
    """The trained router spreads its load: no expert is dead, none takes a third of the branches."""
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    loads = [torch.zeros(16) for _ in layers]

    def watch(layer, load):
        def count(_, args):
            load.add_(args[1].flatten().bincount(minlength=16))

        return layer.experts.register_forward_pre_hook(count)

    handles = [watch(layer, load) for layer, load in zip(layers, loads, strict=True)]
    noise, labels = noise_and_labels(20, seed=3)
    sample(model, noise, labels, steps=8)
    for handle in handles:
        handle.remove()
    assert len(loads) == 3
    for load in loads:
        share = load / load.sum()
        assert share.min() > 0.005
        assert share.max() < 0.33


def test_a_classifier_of_real_digits_recognises_the_samples(model):
    noise, labels = noise_and_labels(60, seed=2024)
    images = sample(model, noise, labels, steps=40)
    assert accuracy(images, labels) >= 0.95
    assert images.std(dim=0).mean() > 0.3  # they differ from each other


def test_the_label_decides_the_digit(model):
    """From one noise, ten labels give their ten digits (one is misread; a model deaf to labels would score 0.1)."""
    noise, labels = noise_and_labels(10, seed=11)
    images = sample(model, noise[:1].expand(10, -1, -1, -1), labels, steps=40)
    assert accuracy(images, labels) >= 0.8


@pytest.mark.slow
def test_the_reported_figure(model):
    images, labels = draw(DIGITS, model, Draw(samples=1000, steps=100, seed=7))
    machine = find_classifier(DIGITS, "svm")
    assert portray(DIGITS, images, labels, machine).accuracy >= 0.97
    assert portray_held_out(DIGITS, 360, machine).accuracy >= 0.98
