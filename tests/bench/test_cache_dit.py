"""cache-dit, unmodified, does on a zoo model what `moeca_fx.bench.cache_dit` says it does."""

import math

import pytest
import torch
from torch import Tensor

from moeca_fx.bench.cache_dit import CacheDitModel, CacheDitSettings
from moeca_fx.errors import ConfigError, UnsupportedModelError
from moeca_fx.runtime.flops import flop_counter
from moeca_fx.zoo import build
from moeca_fx.zoo.dsmoe import DSMoE
from moeca_fx.zoo.layers import unpatchify
from moeca_fx.zoo.sampling import noise_and_labels, sample
from tests.helpers.grids import slow
from tests.helpers.zoo_models import tiny_ditmoe, tiny_dsmoe

pytest.importorskip("cache_dit", reason="the package cache-dit is not installed (extra: peers)")

STEPS = 16
NEVER, ALWAYS = 0.0, 1.0


@pytest.fixture(scope="module")
def digits():
    return build("digits")


@pytest.fixture(scope="module")
def start():
    return noise_and_labels(2, seed=11)


@pytest.fixture(scope="module")
def reference(digits, start):
    return sample(digits, *start, STEPS)


class Restated:
    """DBCache and its TaylorSeer written down from the module's docstring, on the model's own parts."""

    def __init__(self, model: DSMoE, settings: CacheDitSettings) -> None:
        self.model, self.settings = model, settings
        self.step, self.cached = -1, []
        self.head, self.rows = None, []  # of the last computed step; (step, residual) of the computed ones

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.step += 1
        model, first = self.model, self.settings.first
        condition = model.t_embedder(t) + model.y_embedder(y)
        start = tokens = model.x_embedder(x)
        for block in model.blocks[:first]:
            tokens = block(tokens, condition)
        middle = model.blocks[first : len(model.blocks) - self.settings.last]
        if self._may_skip(tokens - start):
            self.cached.append(self.step)
            tokens = tokens + self._predicted()
        else:
            self.head, before = tokens - start, tokens
            for block in middle:
                tokens = block(tokens, condition)
            self.rows.append((self.step, tokens - before))
        for block in model.blocks[len(model.blocks) - self.settings.last :]:
            tokens = block(tokens, condition)
        patches = model.final_layer(tokens, condition)
        return unpatchify(patches, model.config.patch_size, model.config.out_channels)

    def _may_skip(self, head: Tensor) -> bool:
        settings = self.settings
        if settings.full_steps is not None:
            return self.step not in settings.full_steps
        if self.step < settings.warmup or self.head is None:
            return False
        streak = 0
        while self.cached and self.step - 1 - streak in self.cached:
            streak += 1
        if settings.most_in_a_row is not None and streak >= settings.most_in_a_row:
            return False
        return float((head - self.head).abs().mean() / self.head.abs().mean()) < settings.threshold

    def _predicted(self) -> Tensor:
        """Order-1 extrapolation once two steps from the third on are computed, else the held residual."""
        (*_, (last, value)) = self.rows
        if self.settings.order is None or len(self.rows) < 2 or last < 3:
            return value
        before, older = self.rows[-2]
        return value + (value - older) / (last - before) * (self.step - last)


def run(model, start, settings, steps=STEPS):
    """Images, cached steps and executed FLOPs of one trajectory under cache-dit."""
    cached = CacheDitModel(model, settings)
    with flop_counter() as counter:
        images = sample(cached, *start, steps)
    return images, cached.cached_steps, counter.get_total_flops()


@pytest.mark.parametrize("threshold", [NEVER, slow(-0.5)])
def test_without_a_threshold_every_step_computes_and_equals_the_original(digits, start, reference, threshold):
    images, cached, flops = run(digits, start, CacheDitSettings(first=1, threshold=threshold, warmup=0))
    with flop_counter() as counter:
        sample(digits, *start, STEPS)
    assert cached == ()
    assert torch.equal(images, reference)
    assert flops == counter.get_total_flops()


def test_with_a_huge_threshold_every_step_after_the_warm_up_is_cached(digits, start, reference):
    images, cached, flops = run(digits, start, CacheDitSettings(first=1, threshold=ALWAYS, warmup=3))
    assert cached == tuple(range(3, STEPS))
    assert not torch.allclose(images, reference, atol=1e-3)
    with flop_counter() as counter:
        sample(digits, *start, STEPS)
    blocks, skipped = len(digits.blocks), STEPS - 3
    assert 0.25 < flops / counter.get_total_flops() < 1 - 0.7 * skipped / STEPS * (blocks - 1) / blocks


@pytest.mark.parametrize(
    "settings",
    [
        CacheDitSettings(first=1, threshold=0.15, warmup=2),
        CacheDitSettings(first=2, last=1, threshold=0.2, warmup=4, most_in_a_row=1),
        CacheDitSettings(first=1, threshold=0.15, warmup=4, order=1),
        CacheDitSettings(first=1, last=2, order=1, full_steps=(0, 1, 2, 5, 8, 11, 14)),
        CacheDitSettings(first=1, order=1, full_steps=(0, 1, 4, 6, 9, 13)),
    ],
    ids=lambda settings: f"F{settings.first}B{settings.last}-{settings.order}-{settings.full_steps is not None}",
)
def test_it_is_what_its_description_says(digits, start, settings):
    restated = Restated(digits, settings)
    expected = sample(restated, *start, STEPS)
    images, cached, _ = run(digits, start, settings)
    assert cached == tuple(restated.cached)
    assert 3 <= len(cached) <= STEPS - 4  # both kinds of steps ran
    torch.testing.assert_close(images, expected, rtol=0, atol=2e-5)


def test_the_measured_changes_are_reported(digits, start):
    cached = CacheDitModel(digits, CacheDitSettings(first=1, threshold=0.15, warmup=2))
    sample(cached, *start, 8)
    assert set(cached.changes) == set(range(2, 8))
    assert all(change < 0.15 for step, change in cached.changes.items() if step in cached.cached_steps)
    assert all(change >= 0.15 for step, change in cached.changes.items() if step not in cached.cached_steps)


def test_a_sample_is_decided_on_together_with_its_batch(digits):
    """A peculiarity of cache-dit: the change is one mean over the batch, so a sample's image depends on the others."""
    noise, labels = noise_and_labels(4, seed=3)
    changes = []
    for batch in (slice(0, 1), slice(0, 4)):
        cached = CacheDitModel(digits, CacheDitSettings(first=1, threshold=0.15, warmup=1))
        sample(cached, noise[batch], labels[batch], 3)
        changes.append(cached.changes[1])
    assert abs(changes[0] - changes[1]) > 1e-3 * changes[0]


def test_a_reset_begins_a_trajectory_and_without_one_the_last_one_goes_on(digits, start):
    cached = CacheDitModel(digits, CacheDitSettings(first=1, threshold=0.15, warmup=2, order=1))
    first = sample(cached, *start, STEPS)
    carried_over = sample(cached, *start, STEPS)
    cached.reset()
    assert torch.equal(sample(cached, *start, STEPS), first)
    assert not torch.allclose(carried_over, first, atol=1e-3)


def test_the_model_is_left_as_it_was(digits, start, reference):
    before = set(vars(digits))
    run(digits, start, CacheDitSettings(first=1, threshold=ALWAYS, warmup=1))
    assert set(vars(digits)) == before
    assert torch.equal(sample(digits, *start, STEPS), reference)


def test_it_says_nothing_on_standard_output(start, capfd):
    run(tiny_dsmoe(), (torch.zeros(1, 4, 8, 8), torch.zeros(1, dtype=torch.int64)), CacheDitSettings(first=1), steps=2)
    assert capfd.readouterr().out == ""


def test_other_models_and_settings_are_refused():
    with pytest.raises(UnsupportedModelError, match="expected a DSMoE of the zoo"):
        CacheDitModel(tiny_ditmoe(), CacheDitSettings(first=1))
    with pytest.raises(UnsupportedModelError, match="first=2 and last=1 are more than the model's 2 blocks"):
        CacheDitModel(tiny_dsmoe(depth=2), CacheDitSettings(first=2, last=1))


@pytest.mark.parametrize(
    "wrong",
    [{"first": 0}, {"last": -1}, {"warmup": -1}, {"order": 0}, {"threshold": math.nan}, {"full_steps": (1, 3)}],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match=f"CacheDitSettings.{next(iter(wrong))}: expected"):
        CacheDitSettings(**wrong)
