"""``moeca-fx bench`` from end to end on a tiny model of the user's own."""

import csv
import json

import pytest

OPTIONS = ("--steps", 4, "--batch", 2, "--samples", 2, "--threads", 1)


def bench(run, *more):
    return run("bench", "tiny_models:tiny", *OPTIONS, *more)


def test_a_comparison_is_shown_written_and_not_run_twice(run, project):
    chosen = ("--policies", "fewer steps,moeca", "--repeats", 1)
    result = bench(run, *chosen)
    folder = project / "out" / "bench" / "tiny_models-tiny-euler-4"
    content = json.loads((folder / "bench.json").read_text())
    assert result.exit_code == 0
    assert {row["family"] for row in content["rows"]} == {"original", "vectorised", "fewer steps", "moeca"}
    assert all(row["latency"]["speedup"] > 0 for row in content["rows"])
    with (folder / "bench.csv").open() as file:
        assert [row["name"] for row in csv.DictReader(file)] == [row["name"] for row in content["rows"]]
    names = {path.name for path in folder.iterdir()}
    assert {"quality_vs_flops.png", "quality_vs_latency.png", "reuse.png", "drift.png"} <= names
    assert any(name.startswith("experts-") for name in names)
    assert "moeca N=3" in result.stdout and "at 2x fewer FLOPs: best peer" in result.stdout

    before = (project / "out" / "bench" / "runs.jsonl").read_text()
    again = bench(run, *chosen, "--no-figures")
    assert (project / "out" / "bench" / "runs.jsonl").read_text() == before
    assert again.stdout.split("tiny_models")[0] == result.stdout.split("tiny_models")[0]


def test_a_policy_file_runs_as_ours(run, project):
    (project / "mine.yaml").write_text("policy: moeca\ninterval: 2\n")
    chosen = ("--policies", "ours", "--policy-file", "mine.yaml", "--no-latency", "--no-figures")
    result = bench(run, *chosen, "--out", "elsewhere")
    content = json.loads((project / "elsewhere" / "tiny_models-tiny-euler-4" / "bench.json").read_text())
    assert [row["name"] for row in content["rows"]] == ["original", "vectorised", "ours mine"]
    assert "ours mine" in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--steps", 0), "steps must be at least 1, found 0"),
        (("--sampler", "heun"), "no sampler is called 'heun'"),
        (("--batch", 4, "--samples", 6), "samples must be a multiple of batch (4), found 6"),
        (("--policies", "fara"), "--policies: expected families"),
        (("--policy-file", "missing.yaml"), "policy file missing.yaml: cannot be read"),
    ],
)
def test_bad_options_are_refused(refuse, options, message):
    assert message in refuse("bench", "tiny_models:tiny", *options)


def test_a_model_without_a_sampler_is_refused(refuse):
    assert "sample knows the rectified-flow models" in refuse("bench", "tiny_models:without_experts")


def test_a_file_that_is_no_store_is_refused(refuse, project):
    (project / "out" / "bench").mkdir(parents=True)
    (project / "out" / "bench" / "runs.jsonl").write_text("something else\n")
    assert "runs.jsonl, line 1: expected a record" in refuse("bench", "tiny_models:tiny", *OPTIONS)
