"""Measuring a model: on images whose figures are known, on stand-in models, and by the script."""

import logging
import sys
from dataclasses import replace

import pytest
import torch

from moeca_fx.errors import ConfigError, InputError
from moeca_fx.zoo import DSMoE, randomize_
from moeca_fx.zoo.training import measure as measuring
from moeca_fx.zoo.training.measure import Draw, draw, portray_held_out, report
from moeca_fx.zoo.training.portrait import find_classifier, portray
from moeca_fx.zoo.training.task import DIGITS, GLYPHS
from moeca_fx.zoo.training.train import export

LABELS = torch.arange(200) % 10


@pytest.fixture(scope="module")
def copies():
    """200 training images, classes in turn: the work of a model that only copies."""
    images, labels = DIGITS.load_split()[0]
    by_class = [images[labels == c] for c in range(10)]
    return torch.stack([by_class[label][i // 10] for i, label in enumerate(LABELS)])


@pytest.fixture(scope="module")
def confused(copies):
    """The same, but whoever asks for a 3 gets a 5."""
    images = copies.clone()
    images[3::10] = copies[5::10]
    return images


def test_copies_are_recognised_and_give_themselves_away(copies):
    copied, real = portray(DIGITS, copies, LABELS), portray_held_out(DIGITS, 200)
    assert copied.accuracy == copied.merged_accuracy == 1
    assert copied.distance == 0
    assert copied.per_class == (1.0,) * 10
    assert 9 < copied.score <= 10
    assert 1 < real.distance < 4 and real.accuracy > 0.95


def test_a_wrong_class_shows_in_its_share_alone(confused):
    portrait = portray(DIGITS, confused, LABELS)
    assert portrait.accuracy == portrait.merged_accuracy == pytest.approx(0.9)
    assert portrait.per_class == (1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)


def test_look_alikes_count_as_right_in_the_merged_share(confused):
    portrait = portray(replace(DIGITS, look_alikes=((3, 5),)), confused, LABELS)
    assert portrait.accuracy == pytest.approx(0.9)
    assert portrait.merged_accuracy == 1


def test_noise_is_far_from_the_data(copies):
    noise = torch.rand(copies.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    poor, good = portray(DIGITS, noise, LABELS), portray(DIGITS, copies, LABELS)
    assert poor.accuracy < 0.3
    assert poor.frechet > 5 * good.frechet
    assert poor.distance > 3


def test_the_held_out_images_are_all_there_are_at_most():
    images, labels = DIGITS.load_split()[1]
    every, more = portray(DIGITS, images, labels), portray_held_out(DIGITS, 1000)
    assert (more.accuracy, more.distance) == (pytest.approx(every.accuracy), every.distance)


def test_the_frechet_distance_is_of_as_many_images_as_are_held_out():
    images, labels = DIGITS.load_split()[0]
    assert portray(DIGITS, images, labels).frechet == portray(DIGITS, images[:360], labels[:360]).frechet > 1


def test_the_support_vector_machine_can_judge_the_digits_only(copies):
    assert portray(DIGITS, copies, LABELS, find_classifier(DIGITS, "svm")).accuracy > 0.99
    with pytest.raises(ConfigError, match="the glyphs have no classifier 'svm'"):
        find_classifier(GLYPHS, "svm")


def test_chunks_draw_the_same_images_with_other_fresh_noise(monkeypatch):
    def model(x, t, y):
        return -x / (1 - t.view(-1, 1, 1, 1)) + (y == 3).float().view(-1, 1, 1, 1)

    whole, labels = draw(DIGITS, model, Draw(samples=70, steps=3))
    assert labels.tolist() == [i % 10 for i in range(70)]
    monkeypatch.setattr(measuring, "CHUNK", 10)
    ticks = []
    parts, _ = draw(DIGITS, model, Draw(samples=70, steps=3), lambda: ticks.append(1))
    torch.testing.assert_close(parts, whole)
    assert len(ticks) == 7 * 3
    states = []
    record = lambda x, t, y: states.append(x) or model(x, t, y)  # noqa: E731
    draw(DIGITS, record, Draw(samples=70, steps=2, sampler="ancestral"))
    assert not torch.equal(states[1], states[3])


def test_too_few_samples_or_steps_are_refused():
    with pytest.raises(InputError, match=r"more than 64 samples .* found 64 and 100"):
        Draw(samples=64)
    with pytest.raises(InputError, match="at least 1 step"):
        Draw(steps=0)


def test_the_report_shows_every_figure_of_both_sides(copies, confused):
    lines = report(portray(DIGITS, confused, LABELS), portray(DIGITS, copies, LABELS))
    assert lines[1].split() == ["recognised,", "%", "90.00", "100.00"]
    text = "\n".join(lines)
    for part in ("FID (judge features)", "IS (judge)", "look-alikes", "per class 1.00 1.00 1.00 0.00"):
        assert part in text


def test_the_script_measures_a_weights_file(monkeypatch, tmp_path, caplog):
    model = randomize_(DSMoE(DIGITS.config), seed=0)
    export(model.state_dict(), tmp_path / "w.safetensors")
    arguments = ["measure", "--model", "digits", "--weights", str(tmp_path / "w.safetensors")]
    monkeypatch.setattr(sys, "argv", [*arguments, "--samples", "70", "--steps", "1", "--sampler", "ancestral"])
    with caplog.at_level(logging.INFO):
        measuring.main()
    assert "recognised, %" in caplog.text and "per class 0." in caplog.text
