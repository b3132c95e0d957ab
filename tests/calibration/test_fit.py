"""Terms of a forecast and the least squares over them."""

import torch

from moeca_fx.calibration.fit import hold, least_squares, terms, widen
from tests.calibration.samplers import noise


def test_layout_of_terms() -> None:
    outputs, inputs, now = [noise(2, i) for i in range(3)], [noise(2, 10 + i) for i in range(3)], noise(2, 20)
    history = list(zip(outputs, inputs, strict=True))
    assert all(map(torch.equal, terms(history, now, 1, False), outputs[:2]))
    expected = [outputs[0], outputs[1], now, inputs[0], inputs[1]]
    assert all(map(torch.equal, terms(history, now, 1, True), expected))


def test_missing_full_steps_are_zeros() -> None:
    output, old, now = noise(2, 0), noise(2, 1), noise(2, 2)
    nothing = torch.zeros_like(output)
    found = terms([(output, old)], now, 2, True)
    assert len(found) == 7
    assert all(map(torch.equal, found, [output, nothing, nothing, now, old, nothing, nothing]))


def test_a_state_is_widened_with_zeros() -> None:
    state = noise(2, 0)
    wide = widen(state, torch.zeros(2, 5, 3, 3))
    assert torch.equal(wide[:, :2], state)
    assert wide.shape == (2, 5, 3, 3)
    assert not wide[:, 2:].any()


def test_known_weights_are_recovered() -> None:
    rows = torch.stack([noise(8, i).flatten() for i in range(3)])
    weights = torch.tensor([1.5, -0.5, 0.25], dtype=torch.float64)
    found = least_squares(rows, weights @ rows, hold(3))
    assert torch.allclose(found, weights, atol=1e-6)


def test_batched_problems_are_independent() -> None:
    rows = torch.stack([torch.stack([noise(4, 7 * i + j).flatten() for j in range(2)]) for i in range(3)])
    target = torch.stack([noise(4, 50 + i).flatten() for i in range(3)])
    together = least_squares(rows, target, hold(2))
    for one in range(3):
        assert torch.allclose(together[one], least_squares(rows[one], target[one], hold(2)))


def test_without_data_the_prior_remains() -> None:
    rows = torch.stack([noise(4, 0).flatten(), torch.zeros(4 * 18, dtype=torch.float64)])
    found = least_squares(rows, 2 * rows[0], torch.tensor([1.0, 0.7], dtype=torch.float64))
    assert torch.allclose(found, torch.tensor([2.0, 0.7], dtype=torch.float64), atol=1e-6)
