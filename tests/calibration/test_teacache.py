"""TeaCache's fit: the probe sees what the reference sees, and the polynomial follows the output's change."""

import pytest
import torch

import moeca_fx
from moeca_fx.calibration import fit_teacache, record
from moeca_fx.calibration.teacache import input_changes
from moeca_fx.policies import build
from moeca_fx.zoo.layers import modulate
from moeca_fx.zoo.sampling import sample
from tests.helpers import zoo_models

STEPS = 10


def _model() -> torch.nn.Module:
    return zoo_models.tiny_dsmoe(learn_sigma=False)


def _recording(model):
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return record(lambda run: sample(run, noise, torch.arange(3), STEPS), model)


def test_the_change_is_that_of_the_first_modulated_input():
    model = _model()
    recording = _recording(model)
    values = []
    for state, (rest, _) in zip(recording.inputs, recording.arguments, strict=True):
        t, y = rest
        block = model.blocks[0]
        with torch.no_grad():
            shift, scale = block.adaLN_modulation(model.t_embedder(t) + model.y_embedder(y)).chunk(6, dim=1)[:2]
            values.append(modulate(block.norm1(model.x_embedder(state)), shift, scale))
    pairs = zip(values[1:], values[:-1], strict=True)
    expected = torch.stack([(a - b).abs().mean() / (b.abs().mean() + 1e-6) for a, b in pairs])
    torch.testing.assert_close(input_changes(model, recording), expected, rtol=1e-4, atol=1e-6)


def test_a_fit_of_degree_one_is_the_regression_line():
    model = _model()
    recording = _recording(model)
    slope, offset = fit_teacache(model, recording, degree=1)
    x = input_changes(model, recording).double()
    out = recording.outputs.float()
    y = (out[1:] - out[:-1]).abs().flatten(1).mean(1) / (out[:-1].abs().flatten(1).mean(1) + 1e-6)
    residual = y.double() - (slope * x + offset)
    # Normal equations: the residual is orthogonal to a constant and to x.
    assert abs(float(residual.sum())) < 1e-6 and abs(float((residual * x).sum())) < 1e-6


@pytest.mark.slow
def test_the_coefficients_fit_the_policy():
    model = _model()
    recording = _recording(model)
    policy = build("teacache", steps=STEPS, threshold=0.2, coefficients=fit_teacache(model, recording, degree=2))
    fast = moeca_fx.transform(model, zoo_models.inputs(3), policy=policy)
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    assert torch.isfinite(sample(fast, noise, torch.arange(3), STEPS)).all()
    assert fast.stats().full_steps >= 2
