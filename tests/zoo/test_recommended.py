"""The policy files beside the trained models do what their names say, on latents and classes never tuned on."""

import pytest
import torch

import moeca_fx
from moeca_fx.evaluate import psnr_per_image
from moeca_fx.zoo.sampling import noise_and_labels, sample
from moeca_fx.zoo.training.task import find_task

STEPS = 50
# Well below what docs/results.md measured: eight images are few.
LEAST = {
    ("digits", "best-4x"): 46.0,
    ("digits", "branch-4x"): 42.0,
    ("glyphs", "best-4x"): 40.0,
    ("glyphs", "branch-4x"): 39.0,
}


@pytest.mark.parametrize(
    ("model_name", "policy"),
    [pytest.param(*case, marks=[pytest.mark.slow] if case[0] == "glyphs" else []) for case in LEAST],
)
def test_quality_and_speed(model_name: str, policy: str, trained) -> None:
    trained(model_name)
    task, model = find_task(model_name), moeca_fx.zoo.build(model_name)
    noise, labels = noise_and_labels(8, 77, task.config, range(1, task.config.num_classes, 2))
    plain = moeca_fx.transform(model, (noise, torch.zeros(8), labels), policy=None)
    fast = plain.with_policy(task.judge.with_name(f"{policy}.yaml"))
    images, reference = (sample(each, noise, labels, STEPS) for each in (fast, plain))
    assert fast.stats().flops_speedup > 3.9
    assert psnr_per_image(images, reference).median() > LEAST[model_name, policy]
