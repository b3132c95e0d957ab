"""``moeca-fx tune``: a policy file that samples, and its errors."""

import pytest

from moeca_fx import policies
from tests.helpers.grids import slow

QUICK = ("--steps", "8", "--batch", "2", "--level", "output")


def test_a_policy_is_found_written_and_used(run, project):
    result = run("tune", "tiny_models:tiny", "--goal", "2x", *QUICK, "--log", "trials.jsonl", "--out", "made/fast.yaml")
    assert result.exit_code == 0, result.output
    assert "calibrated, 2.00x fewer FLOPs" in result.stdout and "policy made/fast.yaml" in result.stdout
    method = policies.load(project / "made" / "fast.yaml")
    assert len(method.as_dict()["full"]) == 4 and method.as_dict()["sampler"] == "euler"
    lines = (project / "trials.jsonl").read_text().splitlines()
    again = run("tune", "tiny_models:tiny", "--goal", "2x", *QUICK, "--log", "trials.jsonl", "--out", "again.yaml")
    assert again.exit_code == 0 and (project / "trials.jsonl").read_text().splitlines() == lines
    assert policies.load(project / "again.yaml") == method
    sampled = run("sample", "tiny_models:tiny", "--steps", "8", "--policy", "made/fast.yaml", "--out", "it.png")
    assert sampled.exit_code == 0, sampled.output


def test_a_policy_for_other_steps_or_another_sampler_is_refused(run, project):
    weights = tuple((step, (1.0,)) for step in (1, 3, 5, 7))
    method = policies.build("calibrated", steps=8, full=(0, 2, 4, 6), weights=weights, sampler="euler")
    policies.save(method, project / "fast.yaml")
    longer = run("sample", "tiny_models:tiny", "--steps", "9", "--policy", "fast.yaml", "--out", "it.png")
    assert longer.exit_code == 2 and "made for 8 steps, found 9" in longer.stderr
    other = run(
        *("sample", "tiny_models:tiny", "--steps", "8", "--sampler", "ancestral", "--policy", "fast.yaml"),
        *("--out", "it.png"),
    )
    assert other.exit_code == 2 and "made with the euler sampler" in other.stderr
    assert not (project / "it.png").exists()


@pytest.mark.parametrize("goal", ["100x", slow("2x,150dB"), slow("2x,1B")])
def test_the_best_found_is_kept_when_the_goal_is_not_met(run, project, goal):
    result = run("tune", "tiny_models:tiny", "--goal", goal, *QUICK, "--out", "fast.yaml")
    assert result.exit_code == 2
    assert "was not met on held-out latents; the best found is in fast.yaml" in " ".join(result.stderr.split())
    assert policies.load(project / "fast.yaml").method == "calibrated"
    assert (project / "fast.trials.jsonl").read_text().count("\n") >= 1, "resumable by default"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--goal", "fast"), "expected parts like '3x'"),
        (("--goal", "2x,0MB"), "cache size above 0 bytes"),
        (("--steps", "3"), "--steps must be at least 4"),
        (("--out", "policy.txt"), "ending in .yaml"),
        (("--level", "deep"), "level: expected"),
    ],
)
def test_mistakes_are_named(refuse, arguments, part):
    assert part in refuse("tune", "tiny_models:tiny", *QUICK, *arguments)
