"""Training a model of the zoo: its tasks and pieces, and a run that is stopped and resumed."""

import math
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from moeca_fx.errors import ConfigError, TargetError, WeightsError
from moeca_fx.zoo import DSMoE, load_weights, randomize_
from moeca_fx.zoo.catalog import CONFIGS, TRAINED
from moeca_fx.zoo.training import train as training
from moeca_fx.zoo.training.balance import LoadBalancer
from moeca_fx.zoo.training.state import TrainOptions
from moeca_fx.zoo.training.task import TASKS, find_task
from tests.helpers.zoo_models import TINY_PIXELS

OPTIONS = TrainOptions(steps=8, batch=16, seed=3, warmup=2)
GREY_STEP = 1 / 8


@pytest.fixture
def digits():
    return find_task("digits").load_split()[0]


def run(options, digits, until=None, state=None):
    state = state or training.start(options, TINY_PIXELS)
    losses = []
    training.train(state, options, digits, GREY_STEP, until=until, after_step=lambda _, loss, __: losses.append(loss))
    return state, losses


@pytest.mark.parametrize(
    ("name", "parameters", "tokens", "experts", "top_k"),
    [("digits", 2_000_000, 64, 16, 4), ("glyphs", 8_000_000, 256, 48, 5)],
)
def test_the_models_keep_their_promises(name, parameters, tokens, experts, top_k):
    config = find_task(name).config
    with torch.device("meta"):
        model = DSMoE(config)
    assert sum(p.numel() for p in model.parameters()) >= parameters
    assert (config.tokens, config.num_experts, config.top_k) == (tokens, experts, top_k)
    assert {config.is_moe(i) for i in range(config.depth)} == {True, False}


def test_tasks_are_the_trained_models_of_the_zoo():
    assert {name: task.weights for name, task in TASKS.items()} == TRAINED
    assert all(CONFIGS[name] is task.config and task.name == name for name, task in TASKS.items())
    with pytest.raises(TargetError, match="'dsmoe-s-e16' is no trained model of the zoo; trained models: digits, gl"):
        find_task("dsmoe-s-e16")


def test_the_grey_step_is_the_distance_of_two_grey_levels(digits):
    levels = digits[0].unique()
    assert find_task("digits").grey_step == GREY_STEP == float(levels.diff().min())
    assert find_task("glyphs").grey_step == pytest.approx(2 / 255)


def test_splits_are_disjoint_and_scaled():
    (images, labels), (held, held_labels) = find_task("digits").load_split()
    assert len(images) + len(held) == 1797
    assert images.shape[1:] == (1, 8, 8)
    assert images.min() == -1 and images.max() == 1
    assert set(labels.tolist()) == set(held_labels.tolist()) == set(range(10))
    assert torch.cdist(held.flatten(1), images.flatten(1)).min() > 0


def test_flow_batch_lies_on_the_line_from_noise_to_image(digits):
    images, labels = digits
    x, t, y, velocity = training.flow_batch(images, labels, 64, GREY_STEP)
    target = x + (1 - t.view(-1, 1, 1, 1)) * velocity
    nearest = torch.cdist(target.flatten(1), images.flatten(1), p=math.inf)
    assert nearest.min(dim=1).values.max() <= 1 / 16 + 1e-5  # half a grey level of jitter
    assert torch.equal(labels[nearest.argmin(dim=1)], y)
    noise = x - t.view(-1, 1, 1, 1) * velocity
    assert noise.mean().abs() < 0.1 and 0.9 < noise.std() < 1.1
    assert ((t * 64).floor() == torch.arange(64)).all()


def test_logit_normal_timesteps_prefer_the_middle(digits):
    _, t, _, _ = training.flow_batch(*digits, 4096, GREY_STEP, "logit-normal")
    assert ((t >= 0) & (t <= 1)).all()
    assert t.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist() == pytest.approx([0.3375, 0.5, 0.6625], abs=1e-3)


def test_learning_rate_warms_up_and_falls_to_zero():
    options = TrainOptions(steps=100, warmup=10, learning_rate=1.0)
    rates = [training.learning_rate(step, options) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == rates[9] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0.0)
    assert all(a >= b for a, b in pairwise(rates[10:]))


def test_balancer_raises_idle_experts_and_lowers_busy_ones():
    model = randomize_(DSMoE(TINY_PIXELS))
    gate = model.blocks[1].mlp.gate
    gate.e_score_correction_bias.copy_(torch.tensor([5.0, 4.0, 0.0, 0.0]))  # everything goes to experts 0 and 1
    before = gate.e_score_correction_bias.clone()
    balancer = LoadBalancer(model, rate=0.01)
    with torch.no_grad():
        model(torch.randn(2, 1, 8, 8), torch.rand(2), torch.tensor([1, 2]))
    assert balancer.update() == pytest.approx(2.0)
    moved = gate.e_score_correction_bias - before
    torch.testing.assert_close(moved, torch.tensor([-0.01, -0.01, 0.01, 0.01]))
    balancer.close()
    with torch.no_grad():
        model(torch.randn(2, 1, 8, 8), torch.rand(2), torch.tensor([1, 2]))
    assert balancer.counts[0].sum() == 0


def test_training_starts_at_the_published_zero_gates(digits):
    model = training.start(OPTIONS, TINY_PIXELS).model
    x, t, y, _ = training.flow_batch(*digits, 4, GREY_STEP)
    assert not model(x, t, y)[0].any()
    assert not model.blocks[1].adaLN_modulation[1].weight.any()
    assert model.blocks[1].mlp.experts.blocks[0].up_proj.weight.any()


def test_training_lowers_the_loss(digits):
    _, losses = run(replace(OPTIONS, steps=60, learning_rate=1e-2), digits)
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(digits, tmp_path):
    whole, losses = run(OPTIONS, digits)
    half, first = run(OPTIONS, digits, until=5)
    half.save(tmp_path / "c.pt", OPTIONS)
    torch.manual_seed(12345)
    resumed = training.start(replace(OPTIONS, seed=77), TINY_PIXELS)
    resumed.restore(tmp_path / "c.pt", OPTIONS)
    assert resumed.step == 5
    resumed, second = run(OPTIONS, digits, state=resumed)
    assert first + second == losses
    for name, value in whole.average.items():
        assert torch.equal(value, resumed.average[name]), name
    assert not list(tmp_path.glob("*.partial"))


def test_resuming_may_replan_the_steps_and_nothing_else(digits, tmp_path):
    state, _ = run(OPTIONS, digits, until=1)
    state.save(tmp_path / "c.pt", OPTIONS)
    state.restore(tmp_path / "c.pt", replace(OPTIONS, steps=4))
    with pytest.raises(ConfigError, match="'batch': 16"):
        state.restore(tmp_path / "c.pt", replace(OPTIONS, batch=8))


def test_a_missing_or_broken_checkpoint_is_named(tmp_path):
    state = training.start(OPTIONS, TINY_PIXELS)
    (tmp_path / "broken.pt").write_bytes(b"nothing")
    for name in ("gone.pt", "broken.pt"):
        with pytest.raises(WeightsError, match=f"cannot resume: .*{name}"):
            state.restore(tmp_path / name, OPTIONS)


@pytest.mark.parametrize(
    "change", [{"steps": 0}, {"batch": 0}, {"learning_rate": 0.0}, {"ema_decay": 1.0}, {"timesteps": "late"}]
)
def test_impossible_options_are_refused(change):
    with pytest.raises(ConfigError, match="TrainOptions"):
        replace(OPTIONS, **change)


def test_exported_weights_load_into_the_model(digits, tmp_path):
    state, _ = run(OPTIONS, digits, until=2)
    training.export(state.average, tmp_path / "w.safetensors")
    model = DSMoE(TINY_PIXELS)
    load_weights(model, tmp_path / "w.safetensors")
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, state.average[name], atol=1e-3, rtol=1e-3)


def test_the_script_trains_checkpoints_and_resumes(tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "digits", replace(TASKS["digits"], config=TINY_PIXELS))
    arguments = [
        "train",
        "--model",
        "digits",
        "--out",
        str(tmp_path),
        "--batch",
        "8",
        "--warmup",
        "1",
        "--checkpoint-every",
        "1",
    ]
    monkeypatch.setattr(sys, "argv", [*arguments, "--steps", "2"])
    training.main()
    monkeypatch.setattr(sys, "argv", [*arguments, "--steps", "3", "--resume"])
    training.main()
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 3
    load_weights(DSMoE(TINY_PIXELS), tmp_path / "digits.safetensors")
