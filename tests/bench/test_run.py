"""A whole bench on a tiny model."""

import json

import pytest
import torch

from moeca_fx.bench import run as run_module
from moeca_fx.bench.contestants import build_contestant
from moeca_fx.bench.entries import Entry
from moeca_fx.bench.fitted import FITTED, fill_in
from moeca_fx.bench.latency import time_group
from moeca_fx.bench.quality import draw_all
from moeca_fx.bench.report import HEADINGS, cells, document, ordered, write_numbers
from moeca_fx.bench.run import Bench
from moeca_fx.bench.store import Store
from moeca_fx.bench.suite import BASELINES
from moeca_fx.evaluate import psnr
from moeca_fx.zoo.sampling import sample
from tests.bench.conftest import STEPS

MOECA = Entry("moeca", "policy", "paper", {"interval": 3}, "N=3")
FEWER = Entry("fewer steps", "steps", fields={"steps": 3}, label="3")
ENTRIES = (*BASELINES, FEWER, MOECA)


@pytest.fixture
def built(monkeypatch):
    """Names of the entries that were built, in order."""
    names = []

    def build(entry, *rest, **options):
        names.append(entry.name)
        return build_contestant(entry, *rest, **options)

    monkeypatch.setattr(run_module, "build_contestant", build)
    return names


def test_what_each_run_found(subject, settings, tmp_path):
    rows = {row.entry.family: row for row in Bench(subject, settings, Store(tmp_path / "r.jsonl")).run(ENTRIES, False)}
    original, vectorised = rows["original"].quality, rows["vectorised"].quality
    assert original.psnr is None and original.flops_speedup == 1 and original.full_steps == STEPS
    assert vectorised.psnr is None or vectorised.psnr > 100
    assert vectorised.flops_speedup == 1
    assert rows["fewer steps"].quality.flops_speedup == 2
    moeca = rows["moeca"].quality
    assert 1 < moeca.flops_speedup < 3 and (moeca.full_steps, moeca.other_steps) == (2, 4)
    assert 0 < moeca.match_ratio <= 1 and 0 < moeca.reuse_ratio <= 1 and moeca.cache_bytes > 0
    assert moeca.accuracy is None and moeca.fid is None  # nobody judges a random model
    assert all(row.latency is None for row in rows.values())


def test_psnr_is_against_the_originals_images_of_the_same_noise(subject, settings, tmp_path):
    bench = Bench(subject, settings, Store(tmp_path / "r.jsonl"))
    noise, labels = subject.start(settings)
    velocity = subject.velocity(subject.model)
    expected = torch.cat([sample(velocity, *part, STEPS) for part in zip(noise.split(2), labels.split(2), strict=True)])
    assert torch.equal(bench.reference, expected)
    assert set(labels.tolist()) == {1, 3, 5, 7}
    fewer = torch.cat([sample(velocity, *part, 3) for part in zip(noise.split(2), labels.split(2), strict=True)])
    assert bench.quality(FEWER).psnr == pytest.approx(psnr(fewer, expected), abs=1e-3)


def test_a_stochastic_run_is_repeatable_and_every_batch_has_its_own_noise(subject, tmp_path):
    from moeca_fx.bench.settings import BenchSettings

    pytest.importorskip("diffusers", reason="the package diffusers is not installed (extra: peers)")
    settings = BenchSettings(steps=STEPS, sampler="ancestral", batch=2, samples=4, seed=3)
    contestant = build_contestant(FEWER, subject, settings)
    first, second = (draw_all(contestant, subject, settings) for _ in range(2))
    assert torch.equal(first, second)
    noise, labels = subject.start(settings)
    alike = contestant.draw(noise[:2], labels[:2], settings.seed)
    other = contestant.draw(noise[:2], labels[:2], settings.seed + 1)
    assert torch.equal(alike, first[:2]) and not torch.equal(alike, other)


def test_what_is_in_the_store_is_not_run_again(subject, settings, tmp_path, built):
    path = tmp_path / "r.jsonl"
    first = Bench(subject, settings, Store(path)).run(ENTRIES, latency=True)
    assert built.count("moeca N=3") == 1
    built.clear()
    bench = Bench(subject, settings, Store(path))
    assert bench.steps_left(ENTRIES) == 0
    assert bench.run(ENTRIES, latency=True) == first
    assert built == []


def test_an_interrupted_bench_goes_on_where_it_stopped(subject, settings, tmp_path, built, monkeypatch):
    path = tmp_path / "r.jsonl"
    original_measure = run_module.measure

    def interrupted(contestant, *rest):
        if len(path.read_text().splitlines() if path.exists() else []) == 3:
            raise KeyboardInterrupt
        return original_measure(contestant, *rest)

    monkeypatch.setattr(run_module, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Bench(subject, settings, Store(path)).run(ENTRIES, latency=False)
    monkeypatch.setattr(run_module, "measure", original_measure)
    built.clear()
    rows = Bench(subject, settings, Store(path)).run(ENTRIES, latency=False)
    assert built == ["original", "moeca N=3"]  # the reference, and what was missing
    assert all(row.quality is not None for row in rows)


def test_other_weights_are_other_runs(subject, settings, tmp_path, built):
    from dataclasses import replace

    from tests.helpers.zoo_models import tiny_dsmoe

    store = Store(tmp_path / "r.jsonl")
    Bench(subject, settings, store).run(BASELINES[:1], latency=False)
    built.clear()
    other = replace(subject, model=tiny_dsmoe(depth=2, seed=5))
    Bench(other, settings, store).run(BASELINES[:1], latency=False)
    assert built == ["original", "original"]  # the reference, and the entry


def test_teacache_runs_with_a_polynomial_fitted_to_the_model(subject, settings):
    fields = {"threshold": 0.3, "steps": STEPS, "coefficients": FITTED}
    entry = Entry("teacache", "policy", fields=fields)
    found = fill_in(entry, subject, settings)["coefficients"]
    assert len(found) == 5 and found != (1.0, 0.0)
    contestant = build_contestant(entry, subject, settings)
    images = draw_all(contestant, subject, settings)
    assert torch.isfinite(images).all() and contestant.work().full_steps >= 2 * 2  # first and last, two batches


def test_a_run_that_does_not_fit_is_left_out_with_its_reason(subject, settings, tmp_path):
    wrong = Entry("cache-dit", "cache-dit", fields={"first": 9})
    (*_, row) = Bench(subject, settings, Store(tmp_path / "r.jsonl")).run((*BASELINES, wrong), latency=False)
    assert row.quality is None
    assert "first=9" in row.refused or "cache_dit" in row.refused


def test_times_are_taken_beside_both_originals(subject, settings):
    times = time_group((MOECA, FEWER), subject, settings)
    assert set(times) == {"original", "vectorised", "moeca N=3", "fewer steps 3"}
    assert times["original"].speedup == 1 and times["vectorised"].over_vectorised == 1
    assert all(len(time.seconds) == settings.repeats and time.median_seconds > 0 for time in times.values())


def test_the_numbers_are_written_and_shown(subject, settings, tmp_path):
    rows = Bench(subject, settings, Store(tmp_path / "r.jsonl")).run(ENTRIES, latency=True)
    wrong = run_module.Row(Entry("odd", "policy", "peer"), refused="does not fit")
    numbers, table = write_numbers(document([*rows, wrong], subject, settings), tmp_path)
    content = json.loads(numbers.read_text())
    assert [row["family"] for row in content["rows"]] == ["original", "vectorised", "fewer steps", "moeca", "odd"]
    assert content["settings"]["steps"] == STEPS and content["rows"][-1]["refused"] == "does not fit"
    assert str(tmp_path) not in numbers.read_text()
    header, *lines = table.read_text().splitlines()
    assert len(lines) == 5 and {"name", "quality_psnr", "latency_speedup"} <= set(header.split(","))
    for row in ordered([*rows, wrong]):
        assert len(cells(row)) == len(HEADINGS)
    assert cells(rows[0])[:3] == ("original", "1.00", "1.00") and cells(rows[0])[5] == "equal"
