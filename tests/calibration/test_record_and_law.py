"""What is recorded of a sampler, and what poking it reveals."""

import pytest
import torch

from moeca_fx.calibration import find_law, record
from moeca_fx.errors import InputError
from tests.calibration.samplers import Counting, bent, euler, noise, noisy

STEPS = 7


def test_records_every_call_and_the_result() -> None:
    start, model = noise(3, 0), Counting(bent)
    sampler = euler(start, STEPS)
    found = record(sampler, model)
    assert (found.steps, model.calls) == (STEPS, STEPS)
    assert torch.equal(found.inputs[0], start)
    assert torch.equal(found.inputs[3], found.inputs[2] + found.outputs[2] / STEPS)
    assert torch.equal(found.final, sampler(bent))
    assert [rest for rest, _ in found.arguments] == [(step / STEPS,) for step in range(STEPS)]


def test_the_first_output_counts_and_extra_channels_do_not_move_the_state() -> None:
    start = noise(2, 0)

    def with_variances(x: torch.Tensor, t: float) -> tuple[torch.Tensor, str]:
        return torch.cat([bent(x, t), torch.ones_like(x)], 1), "loss"

    found = record(lambda model: euler(start, STEPS)(lambda x, t: model(x, t)[0][:, :2]), with_variances)
    assert found.outputs.shape == (STEPS, 2, 4, 3, 3)
    assert torch.equal(found.velocities, found.outputs[:, :, :2].flatten(2))


def test_a_sampler_that_never_calls_is_refused() -> None:
    with pytest.raises(InputError, match="without calling the model"):
        record(lambda model: torch.zeros(1), bent)


def test_calls_of_different_shape_are_refused() -> None:
    def two_sizes(model):
        model(noise(2, 0), 0.0)
        return model(noise(3, 0), 0.5)

    with pytest.raises(InputError, match="calls of one shape"):
        record(two_sizes, bent)


def test_a_model_that_returns_no_tensor_is_refused() -> None:
    with pytest.raises(InputError, match="found str"):
        record(lambda model: model(noise(2, 0), 0.0), lambda x, t: "velocity")


def test_law_of_euler_and_of_a_stochastic_sampler() -> None:
    for sampler, keep, push in (
        (euler(noise(3, 0), STEPS), 1.0, 1 / STEPS),
        (noisy(noise(3, 0), STEPS, seed=5), 1 - 1 / STEPS, 2 / STEPS),
    ):
        law = find_law(sampler, record(sampler, bent))
        assert law.affine
        assert law.push == pytest.approx([push] * STEPS)
        assert law.keep[1:] == pytest.approx([keep] * (STEPS - 1))  # nothing moves the first state


def test_a_step_that_clips_has_no_law() -> None:
    def clipping(model):
        x = noise(3, 0)
        for step in range(STEPS):
            x = x + model(x, step / STEPS) / STEPS
            x = x.clamp(-0.5, 0.5) if step == 3 else x
        return x

    law = find_law(clipping, record(clipping, bent))
    assert not law.affine
    assert [step for step in range(STEPS) if law.push[step] == 0.0] == [3]


def test_a_multistep_sampler_has_no_law_where_it_remembers() -> None:
    def two_step(model):
        x, old = noise(3, 0), None
        for step in range(STEPS):
            new = model(x, step / STEPS)
            x = x + (new if old is None else 1.5 * new - 0.5 * old) / STEPS
            old = new
        return x

    law = find_law(two_step, record(two_step, bent))
    # At step 1 the state still tells what the first output was.
    assert law.push[:2] == pytest.approx((1 / STEPS, 1.5 / STEPS))
    assert law.push[2:] == (0.0,) * (STEPS - 2)


def test_a_sampler_with_a_running_generator_is_refused() -> None:
    generator = torch.Generator().manual_seed(0)

    def forgetful(model):
        x = noise(3, 0)
        for step in range(STEPS):
            x = x + model(x, step / STEPS) / STEPS + torch.randn(x.shape, generator=generator, dtype=x.dtype)
        return x

    with pytest.raises(InputError, match="did not repeat itself"):
        find_law(forgetful, record(forgetful, bent))
