"""A calibration reproduces what its terms can express, corrects its own errors and holds on unseen samples."""

import pytest
import torch

from moeca_fx.calibration import (
    Calibration,
    Replay,
    calibrate,
    find_law,
    fit_weights,
    image_metric,
    record,
    state_metric,
)
from moeca_fx.calibration.law import Law
from moeca_fx.errors import ConfigError, InputError
from tests.calibration.samplers import Counting, bent, euler, noise, noisy, polynomial

STEPS = 24


def error(images: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean squared difference."""
    return (images - reference).pow(2).mean().item()


@pytest.mark.parametrize("order", [0, 1, 2])
def test_polynomials_up_to_the_order_are_exact(order: int) -> None:
    sampler, model = euler(noise(4, 0), 9), polynomial(order, 4, 1)
    recording = record(sampler, model)
    law, full = find_law(sampler, recording), (0, 1, 2, 5)
    found = fit_weights(recording, sampler, model, full, law=law, metric=state_metric(9), order=order, inputs=False)
    assert error(sampler(Replay(model, found)), recording.final) < 1e-12
    # After steps 0, 1, 2 the forecast of step 3 is the binomial extrapolation.
    expected = {0: [1.0], 1: [2.0, -1.0], 2: [3.0, -3.0, 1.0]}[order]
    assert found.weights[3] == pytest.approx(expected, abs=1e-3)
    rougher = polynomial(order + 1, 4, 1)
    assert error(sampler(Replay(rougher, found)), sampler(rougher)) > 1e-6


def test_weights_on_inputs_recover_a_linear_model() -> None:
    # v = 3 x needs nothing but the current input.
    sampler, model = euler(noise(4, 0), 8), lambda x, t: 3.0 * x
    recording = record(sampler, model)
    law = find_law(sampler, recording)
    fitted = [
        fit_weights(recording, sampler, model, (0,), law=law, metric=state_metric(8), order=0, inputs=inputs)
        for inputs in (True, False)
    ]
    with_inputs, without = (sampler(Replay(model, found)) for found in fitted)
    assert error(with_inputs, recording.final) < 1e-12
    assert error(without, recording.final) < 1e-12  # held output times the growth is exact too: one direction
    noise_driven = noisy(noise(4, 0), 8, seed=3)
    recording = record(noise_driven, model)
    law = find_law(noise_driven, recording)
    with_inputs, without = (
        noise_driven(
            Replay(
                model,
                fit_weights(
                    recording, noise_driven, model, (0,), law=law, metric=state_metric(8), order=0, inputs=inputs
                ),
            )
        )
        for inputs in (True, False)
    )
    assert error(with_inputs, recording.final) < 1e-9
    assert error(without, recording.final) > 1e-3  # fresh noise is seen in the current input only


def test_following_its_own_trajectory_reduces_the_final_error() -> None:
    # Held outputs fall behind a velocity that grows; only the law lets later gaps make up for it.
    sampler, model = euler(noise(8, 0), STEPS), lambda x, t: (1 + t * t) * torch.cos(3 * x)
    recording = record(sampler, model)
    full = tuple(range(0, STEPS, 4))
    law = find_law(sampler, recording)
    blind = Law(law.keep, (0.0,) * STEPS)  # without a law the fit aims at the recorded outputs
    errors = []
    for known in (law, blind):
        found = fit_weights(
            recording, sampler, model, full, law=known, metric=state_metric(STEPS), order=0, inputs=False
        )
        unseen = euler(noise(8, 1), STEPS)
        errors.append(error(unseen(Replay(model, found)), unseen(model)))
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("kind", ["deterministic", "stochastic"])
def test_beats_a_uniform_schedule_of_held_outputs_on_unseen_noise(kind: str) -> None:
    def make(seed: int):
        return euler(noise(8, seed), STEPS) if kind == "deterministic" else noisy(noise(8, seed), STEPS, seed + 100)

    sampler, unseen = make(0), make(1)
    recording = record(sampler, bent)
    found = calibrate(recording, sampler, bent, 8)
    held = Calibration(
        STEPS, tuple(range(0, STEPS, 3)), {j: (1.0,) for j in range(STEPS) if j % 3}, order=0, inputs=False
    )
    model = Counting(bent)
    ours = error(unseen(Replay(model, found)), unseen(bent))
    assert model.calls == len(found.full) == 8
    assert 3 * len(found.full) == STEPS
    assert ours < 0.1 * error(unseen(Replay(bent, held)), unseen(bent))


def test_the_same_call_gives_the_same_calibration() -> None:
    sampler = noisy(noise(4, 0), STEPS, 9)
    recording = record(sampler, bent)
    assert calibrate(recording, sampler, bent, 6) == calibrate(recording, sampler, bent, 6)


def test_image_metric_carries_directions_back() -> None:
    # v = a x with Euler: dx_S/dx_j = (1 + a/S)^(S - j), the same for every direction.
    sampler, model = euler(noise(3, 0), 10), lambda x, t: -2.0 * x
    recording = record(sampler, model)
    metric = image_metric(recording, find_law(sampler, recording), model, probes=3)
    for step in range(11):
        ratio = metric.adjoints[step] / metric.adjoints[10]
        assert torch.allclose(ratio, torch.full_like(ratio, 0.8 ** (10 - step)), rtol=1e-4)
    shift = noise(3, 5).flatten(1)
    early, late = (metric.rows(shift, step).pow(2).sum().item() for step in (0, 10))
    assert early / late == pytest.approx(0.8**20, rel=1e-3)


def test_image_metric_spends_weights_on_what_reaches_the_image() -> None:
    # The sampler forgets channel 1 (its velocity pulls it to 0 in one step), channel 0 stays.
    def model(x: torch.Tensor, t: float) -> torch.Tensor:
        return torch.cat([x[:, :1] * (1 + t), -STEPS * x[:, 1:] + 10 * t], 1)

    sampler = noisy(noise(8, 0), STEPS, 4)
    recording = record(sampler, model)
    law = find_law(sampler, recording)
    full, errors = tuple(range(0, STEPS, 3)), []
    for metric in (state_metric(STEPS), image_metric(recording, law, model, probes=8)):
        found = fit_weights(recording, sampler, model, full, law=law, metric=metric, order=0, inputs=True)
        errors.append(error(sampler(Replay(model, found))[:, :1], recording.final[:, :1]))
    assert errors[1] < errors[0]


def test_replay_refuses_a_longer_trajectory() -> None:
    found = Calibration(2, (0,), {1: (1.0,)}, order=0, inputs=False)
    with pytest.raises(InputError, match="call 3"):
        euler(noise(2, 0), 3)(Replay(bent, found))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"full": (1, 2)}, "full"),
        ({"full": (0, 4)}, "full"),
        ({"weights": {1: (1.0,)}}, "wrong at \\[3\\]"),
        ({"weights": {1: (1.0,), 3: (1.0, 0.0)}}, "1 finite numbers at step 3"),
        ({"weights": {1: (1.0,), 3: (float("nan"),)}}, "1 finite numbers at step 3"),
        ({"order": -1}, "order"),
    ],
)
def test_a_calibration_that_does_not_fit_together_is_refused(fields: dict[str, object], message: str) -> None:
    sound = {"steps": 4, "full": (0, 2), "weights": {1: (1.0,), 3: (1.0,)}, "order": 0, "inputs": False}
    Calibration(**sound)
    with pytest.raises(ConfigError, match=message):
        Calibration(**{**sound, **fields})
