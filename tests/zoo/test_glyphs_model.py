"""The trained glyph model: its size, its router, and glyphs that the judge of real ones recognises."""

import pytest
import torch

from moeca_fx.zoo import build
from moeca_fx.zoo.dsmoe import MoELayer
from moeca_fx.zoo.glyphs.config import GLYPHS, WEIGHTS
from moeca_fx.zoo.judge import load_judge
from moeca_fx.zoo.sampling import noise_and_labels, sample


@pytest.fixture(scope="module")
def model(trained):
    trained("glyphs")
    return build("glyphs")


@pytest.fixture(scope="module")
def drawn(model):
    """One sample a class, and each MoE layer's branches by expert on the way there."""
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    loads = [torch.zeros(48) for _ in layers]

    def watch(layer, load):
        def count(_, args):
            load.add_(args[1].flatten().bincount(minlength=48))

        return layer.experts.register_forward_pre_hook(count)

    handles = [watch(layer, load) for layer, load in zip(layers, loads, strict=True)]
    noise, labels = noise_and_labels(62, seed=3, config=GLYPHS)
    images = sample(model, noise, labels, steps=12)
    for handle in handles:
        handle.remove()
    return images, labels, loads


def test_the_file_is_small_and_the_weights_load_in_full_precision(model):
    assert WEIGHTS.stat().st_size <= 20_000_000
    assert sum(p.numel() for p in model.parameters()) >= 8_000_000
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    assert not model.training


@pytest.mark.slow
def test_every_expert_of_every_layer_is_used(drawn):
    """The trained router spreads its load over 48 experts: none is dead, none takes a tenth of the branches."""
    loads = drawn[2]
    assert len(loads) == 3
    for load in loads:
        share = load / load.sum()
        assert share.min() > 0.001
        assert share.max() < 0.1


@pytest.mark.slow
def test_the_judge_of_real_glyphs_recognises_far_more_than_chance(drawn):
    images, labels, _ = drawn
    assert (load_judge("glyphs").predict(images) == labels).float().mean() >= 0.35
    assert images.std(dim=0).mean() > 0.2  # they differ from each other


def test_the_right_label_predicts_the_velocity_better_than_a_wrong_one(model):
    """On real held-out glyphs, half way between noise and image; a model deaf to labels would draw."""
    from moeca_fx.zoo.glyphs.data import render

    images, labels = render(1, seed=1)
    pick = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:32]
    target, labels = images[pick], labels[pick]
    noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(1))
    half, t = (noise + target) / 2, torch.full((32,), 0.5)
    with torch.no_grad():
        right, wrong = ((model(half, t, y)[0] - (target - noise)).square().mean() for y in (labels, (labels + 31) % 62))
    assert right < 0.9 * wrong
