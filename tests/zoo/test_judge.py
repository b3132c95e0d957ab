"""The judges that ship: what they recognise, the features they give, and how they are trained."""

import logging
import sys
from dataclasses import replace

import pytest
import torch

from moeca_fx.errors import ConfigError, InputError, TargetError, WeightsError
from moeca_fx.zoo.glyphs.data import CLASSES
from moeca_fx.zoo.judge import build_judge, load_judge, load_weights, merge_look_alikes
from moeca_fx.zoo.training import judge as training
from moeca_fx.zoo.training.task import TASKS, find_task

OPTIONS = training.JudgeOptions(steps=30, batch=64)


@pytest.mark.parametrize(("name", "top", "merged"), [("digits", 0.98, 0.98), ("glyphs", 0.985, 0.995)])
def test_the_shipped_judge_recognises_held_out_images(name, top, merged):
    found_top, found_merged = training.held_out_accuracy(load_judge(name), find_task(name))
    assert top <= found_top <= found_merged <= 1
    assert found_merged >= merged


@pytest.mark.parametrize("name", TASKS)
def test_the_shipped_judge_is_small_and_belongs_to_no_single_caller(name):
    assert find_task(name).judge.stat().st_size <= 300_000
    judge = load_judge(name)
    assert judge is load_judge(name)
    assert not judge.training and not any(parameter.requires_grad for parameter in judge.parameters())


def test_noise_is_recognised_no_better_than_by_chance():
    noise = torch.randn(620, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    right = load_judge("glyphs").predict(noise) == torch.arange(620) % 62
    assert right.float().mean() < 0.05


def test_features_probabilities_and_classes_of_one_batch_agree():
    images = find_task("digits").load_split()[1][0]
    judge = load_judge("digits")
    features, probabilities = judge.features(images), judge.probabilities(images)
    assert features.shape == (360, 64) and probabilities.shape == (360, 10)
    torch.testing.assert_close(judge.head(features).softmax(dim=1), probabilities)
    torch.testing.assert_close(judge(images).softmax(dim=1), probabilities)
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(360))
    assert torch.equal(probabilities.argmax(dim=1), judge.predict(images))
    assert torch.linalg.matrix_rank(features - features.mean(dim=0)) == 64  # no dead feature


def test_many_images_are_judged_in_chunks_that_change_nothing(monkeypatch):
    images = find_task("digits").load_split()[1][0][:20]
    whole = load_judge("digits").features(images)
    monkeypatch.setattr("moeca_fx.zoo.judge.CHUNK", 7)
    torch.testing.assert_close(load_judge("digits").features(images), whole)


def test_overshoot_is_clamped():
    images = find_task("digits").load_split()[1][0][:5]
    overshoot = torch.where(images == 1, 3.0, images)
    assert torch.equal(load_judge("digits").features(overshoot), load_judge("digits").features(images))


@pytest.mark.parametrize("shape", [(2, 1, 32, 32), (2, 3, 8, 8), (2, 8, 8)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(InputError, match=r"expects images \[N, 1, 8, 8\], got \[2, "):
        load_judge("digits").predict(torch.zeros(shape))


def test_look_alikes_are_merged_and_others_are_not():
    labels = torch.tensor([CLASSES.index(character) for character in "oO0lI1aA"])
    merged = merge_look_alikes(labels, find_task("glyphs").look_alikes)
    assert [CLASSES[i] for i in merged] == list("000111aA")
    assert torch.equal(merge_look_alikes(labels, ()), labels)
    characters = [i for group in find_task("glyphs").look_alikes for i in group]
    assert len(characters) == len(set(characters))


def test_a_strange_name_or_a_missing_file_is_named(monkeypatch, tmp_path):
    with pytest.raises(TargetError, match="no trained model"):
        load_judge("dsmoe-s-e16")
    monkeypatch.setitem(TASKS, "digits", replace(TASKS["digits"], judge=tmp_path / "j.safetensors"))
    load_judge.cache_clear()
    with pytest.raises(WeightsError, match=r"judge of 'digits' is expected at .*j\.safetensors"):
        load_judge("digits")


def test_training_is_seeded_and_lowers_the_loss():
    def run(seed):
        losses = []
        judge = training.train_judge(
            TASKS["digits"], replace(OPTIONS, seed=seed), lambda done, loss: losses.append((done, loss))
        )
        return judge.state_dict(), losses

    weights, losses = run(1)
    again, _ = run(1)
    other, _ = run(2)
    assert all(torch.equal(value, again[name]) for name, value in weights.items())
    assert not torch.equal(weights["head.weight"], other["head.weight"])
    assert [done for done, _ in losses] == list(range(1, 31))
    assert losses[-1][1] < 0.5 * losses[0][1]


def test_the_script_writes_weights_that_load(monkeypatch, tmp_path, caplog):
    path = tmp_path / "new" / "judge.safetensors"
    monkeypatch.setattr(sys, "argv", ["judge", "--model", "digits", "--out", str(path), "--steps", "12"])
    with caplog.at_level(logging.INFO):
        training.main()
    assert "step 12 of 12" in caplog.text and "held-out accuracy" in caplog.text
    load_weights(build_judge("digits"), path)


@pytest.mark.parametrize("change", [{"steps": 0}, {"batch": 0}, {"learning_rate": 0.0}])
def test_impossible_options_are_refused(change):
    with pytest.raises(ConfigError, match="JudgeOptions"):
        replace(OPTIONS, **change)
