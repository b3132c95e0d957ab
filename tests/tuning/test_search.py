"""The search on a tiny model: targets met or said to be missed, the same result twice, nothing lost on interruption."""

import importlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moeca_fx
from moeca_fx import policies
from moeca_fx.calibration.polish import image_loss
from moeca_fx.errors import ConfigError, InputError, MoecaError
from moeca_fx.evaluate import psnr
from moeca_fx.provenance import fingerprint
from moeca_fx.tuning import Target, Tuned, search
from moeca_fx.tuning.candidates import PLAIN_SHARES, OutputCandidates, fewer_full
from moeca_fx.tuning.trials import Trial, TrialLog
from moeca_fx.zoo.sampling import sample
from tests.helpers import zoo_models
from tests.helpers.grids import slow

STEPS = 12


def _model() -> nn.Module:
    return zoo_models.tiny_dsmoe(learn_sigma=False)


def _sampler(seed: int, first: int) -> Callable[[Any], Tensor]:
    noise = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    labels = first + 2 * torch.arange(4)
    return lambda model: sample(model, noise, labels, STEPS)


CALIBRATION, HELD_OUT = _sampler(0, 0), _sampler(99, 1)


@cache
def _three_times() -> tuple[nn.Module, Tuned]:
    model = _model()
    return model, moeca_fx.tune(model, CALIBRATION, "3x", held_out=HELD_OUT, level="output")


def test_a_speedup_is_reached_and_the_report_is_of_the_held_out_run() -> None:
    model, found = _three_times()
    assert found.met and found.held_out.speedup >= 2.99 and found.method.method == "calibrated"
    fast = moeca_fx.transform(model, zoo_models.inputs(4), policy=found.method)
    assert psnr(HELD_OUT(fast), HELD_OUT(model)) == pytest.approx(found.held_out.psnr, abs=0.01)


@pytest.mark.slow
def test_it_beats_the_uniform_forecast_on_the_calibration_run() -> None:
    model = _model()
    found = moeca_fx.tune(model, CALIBRATION, "3x", held_out=HELD_OUT, level="output")
    uniform = moeca_fx.transform(model, zoo_models.inputs(4), policy=policies.build("forecast", interval=4, warmup=1))
    assert psnr(CALIBRATION(uniform), CALIBRATION(model)) < found.calibration.psnr - 1
    assert uniform.stats().full_steps == 3 < len(found.method.as_dict()["full"])


@pytest.mark.slow
def test_a_quality_is_reached_with_the_fewest_full_steps() -> None:
    model = _model()
    found = moeca_fx.tune(model, CALIBRATION, "35dB", held_out=HELD_OUT, level="output")
    assert found.calibration.psnr >= 35
    full = len(found.method.as_dict()["full"])
    fewer = moeca_fx.tune(model, CALIBRATION, f"{STEPS / (full - 1):.3f}x", held_out=HELD_OUT, level="output")
    assert fewer.calibration.psnr < 35


def test_branches_on_a_calibrated_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    first = search.BranchCandidates.variants
    monkeypatch.setattr(search.BranchCandidates, "variants", lambda self: first(self)[:1])
    found = moeca_fx.tune(_model(), CALIBRATION, "1.5x", held_out=HELD_OUT, level="branch")
    assert found.method.method == "branch_forecast" and found.calibration.speedup >= 1.49
    assert found.calibration.cache_bytes > 0


@pytest.mark.slow
def test_methods_are_compared_on_other_latents_than_they_were_fitted_to() -> None:
    model, other = _model(), _sampler(50, 0)
    found = moeca_fx.tune(model, CALIBRATION, "3x", held_out=HELD_OUT, validation=other, level="output")
    fast = moeca_fx.transform(model, zoo_models.inputs(4), policy=found.method)
    assert psnr(other(fast), other(model)) == pytest.approx(found.calibration.psnr, abs=0.01)


@pytest.mark.slow
def test_a_model_that_predicts_variances_too() -> None:
    model = zoo_models.tiny_dsmoe()  # twice as many output as input channels
    found = moeca_fx.tune(model, CALIBRATION, "3x", held_out=HELD_OUT, level="output")
    held = moeca_fx.transform(model, zoo_models.inputs(4), policy=policies.build("forecast", interval=3, warmup=1))
    assert found.met and found.held_out.psnr > psnr(HELD_OUT(held), HELD_OUT(model))


@pytest.mark.slow
def test_samplers_that_unpack_a_tuple_and_move_time_in_place() -> None:
    noise = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def sampler(run: Any) -> Tensor:
        x, t = noise, torch.zeros(4)
        for _ in range(STEPS):
            velocity, *_ = run(x, t, torch.arange(4))
            x = x + velocity / STEPS
            t += 1 / STEPS
        return x

    model = _model()
    found = moeca_fx.tune(model, sampler, "3x", held_out=sampler, level="output")
    same = moeca_fx.tune(
        model, lambda run: sample(run, noise, torch.arange(4), STEPS), "3x", held_out=HELD_OUT, level="output"
    )
    assert found.method.as_dict()["full"] == same.method.as_dict()["full"]


def test_the_nearest_to_an_impossible_target_is_best() -> None:
    target = Target(speedup=3.0, psnr=40.0)
    assert target.shortfall(3.0, 40.0, 0) == 0
    assert target.shortfall(1.5, 41.0, 0) == pytest.approx(6.02, abs=0.01)
    assert target.shortfall(3.5, 37.0, 0) == pytest.approx(3.0)


def test_a_target_out_of_reach_is_said_with_the_best_found() -> None:
    found = moeca_fx.tune(_model(), CALIBRATION, "3x,150dB", held_out=HELD_OUT, level="output")
    assert not found.met and found.held_out.speedup > 1


@pytest.mark.parametrize("target", [slow("2x,1B"), slow("35dB,1B"), "13x"])
def test_what_cannot_be_met_gives_the_nearest(target: str) -> None:
    found = moeca_fx.tune(_model(), CALIBRATION, target, held_out=HELD_OUT, level="output")
    assert not found.met and found.held_out is not None
    assert found.held_out.cache_bytes > 1 and (found.held_out.speedup == pytest.approx(12) or target != "13x")


def test_without_held_out_latents_the_report_is_of_those_compared_on() -> None:
    found = moeca_fx.tune(_model(), CALIBRATION, "3x", level="output")
    assert found.met and found.held_out is None
    assert found.method == _three_times()[1].method, "a second search finds the same"


def test_an_interrupted_search_repeats_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, measured = tmp_path / "trials.jsonl", []
    original = search._Search.measure

    def counting(self: Any, method: Any, sampler: Any, reference: Tensor) -> Trial:
        measured.append(method)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return original(self, method, sampler, reference)

    monkeypatch.setattr(search._Search, "measure", counting)
    with pytest.raises(KeyboardInterrupt):
        moeca_fx.tune(_model(), CALIBRATION, "35dB", held_out=HELD_OUT, level="output", log_file=log)
    assert len(log.read_text().splitlines()) == 2
    log.write_text(log.read_text() + '{"run": "cut o')  # the line that was being written
    assert len(TrialLog(log, "some run")._done) == 0 and len(log.read_text().splitlines()) == 2
    log.write_text(log.read_text() + '{"run": "cut o')
    first = list(measured)
    found = moeca_fx.tune(_model(), CALIBRATION, "35dB", held_out=HELD_OUT, level="output", log_file=log)
    assert measured[3:].count(first[0]) == 0 and measured[3:].count(first[1]) <= 1  # the winner is measured on held-out
    assert found.trials >= 3


@pytest.mark.slow
def test_moved_steps_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "made" / "trials.jsonl"
    first = moeca_fx.tune(_model(), CALIBRATION, "3x", level="output", log_file=str(log))
    lines = log.read_text().splitlines()
    assert sum('"full"' in line and '"loss"' in line for line in lines) > 5
    judged: list[Tensor] = []
    for name in ("moeca_fx.calibration.polish", "moeca_fx.tuning.candidates"):
        module = importlib.import_module(name)
        monkeypatch.setattr(module, "image_loss", lambda images, reference: judged.append(images))
    again = moeca_fx.tune(_model(), CALIBRATION, "3x", level="output", log_file=log)
    assert again.method == first.method and not judged and log.read_text().splitlines() == lines


@pytest.mark.parametrize("content", ['{"name": "mine"}', '{"name": "mine"}\n', "a\nb", '{"run": "x", "other": 1}\n'])
def test_a_file_that_is_no_log_is_refused_and_kept(content: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match="expected a trial"):
        moeca_fx.tune(_model(), CALIBRATION, "3x", log_file=path)
    assert path.read_text() == content


def test_a_log_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(MoecaError, match="cannot be read"):
        moeca_fx.tune(_model(), CALIBRATION, "3x", log_file=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(MoecaError, match="cannot be written"):
        moeca_fx.tune(_model(), CALIBRATION, "3x", level="output", log_file=tmp_path / "file" / "log.jsonl")


def test_samplers_that_cannot_be_tuned() -> None:
    with pytest.raises(InputError, match="without calling"):
        moeca_fx.tune(_model(), lambda model: torch.zeros(1), "3x", held_out=HELD_OUT)
    with pytest.raises(InputError, match="did not repeat itself"):
        moeca_fx.tune(
            _model(),
            lambda model: sample(model, torch.randn(4, 4, 8, 8), torch.arange(4), STEPS),
            "3x",
            held_out=HELD_OUT,
        )
    with pytest.raises(InputError, match="first positional argument, found the keywords x"):
        moeca_fx.tune(
            _model(),
            lambda run: run(x=torch.randn(4, 4, 8, 8), t=torch.zeros(4), y=torch.arange(4)),
            "3x",
            held_out=HELD_OUT,
        )

    def guided(run: Any) -> Tensor:
        with run.context("cond"):
            return run(torch.randn(4, 4, 8, 8), torch.zeros(4), torch.arange(4))

    with pytest.raises(InputError, match="guidance in two calls; calibrate without guidance"):
        moeca_fx.tune(_model(), guided, "3x")
    with pytest.raises(ConfigError, match="level"):
        moeca_fx.tune(_model(), CALIBRATION, "3x", held_out=HELD_OUT, level="deep")  # type: ignore[arg-type]


def test_fingerprints_of_half_precision_runs() -> None:
    run = torch.randn(3, 4)
    assert fingerprint(run.bfloat16()) == fingerprint(run.bfloat16()) != fingerprint(run.half())


def test_the_images_choose_between_starts() -> None:
    """With fresh noise at every step and few full steps, the linear estimate of an error's effect misleads."""
    noise, labels = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    model = _model()
    plain = moeca_fx.transform(model, zoo_models.inputs(4), policy=None)
    output = OutputCandidates(model, plain, lambda run: sample(run, noise, labels, STEPS, sampler="ancestral"))
    first = output.method(3, "ancestral")
    seen: dict[float, dict[tuple[int, ...], float]] = {share: {} for share in PLAIN_SHARES}
    chosen = output.polished(first, 0, losses=lambda share: seen[share])
    assert all(first.full in losses and (0, 4, 8) in losses for losses in seen.values())
    images = output.sampler(plain.with_policy(chosen))
    assert image_loss(images, output.recording.final) == pytest.approx(
        min(loss for losses in seen.values() for loss in losses.values()), abs=1e-3
    )


def test_full_steps_for_a_speedup_follow_from_one_trial() -> None:
    """50 steps, a cached one costs a fifth: K full cost K + .2 (50 - K), so 4x, 12.5 in all, allows 3.125."""
    found = 50 / (12 + 0.2 * 38)
    assert fewer_full(50, 12, found, 4.0) == 3
    assert fewer_full(50, 12, found, 2.56) == 11
    assert fewer_full(50, 12, found, 6.0) < 1, "a fifth of all steps is too slow for 6x"
