"""The list of runs, and what chooses from it."""

import json

import pytest

from moeca_fx import policies
from moeca_fx.bench.cache_dit import CacheDitSettings
from moeca_fx.bench.entries import Entry
from moeca_fx.bench.fitted import FITTED
from moeca_fx.bench.settings import BenchSettings
from moeca_fx.bench.suite import choose, from_file, from_files, label, suite
from moeca_fx.errors import ConfigError
from moeca_fx.zoo.solvers import SOLVERS


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("steps", [20, 50, 250])
def test_every_run_can_be_built_and_has_a_name_and_a_key_of_its_own(steps, stochastic):
    entries = suite(steps, stochastic)
    assert len({entry.name for entry in entries}) == len(entries)
    assert len({json.dumps(entry.key(), sort_keys=True) for entry in entries}) == len(entries)
    for entry in entries:
        if entry.kind == "policy":
            fitted = {name: (1.0, 0.0) for name, value in entry.fields.items() if value == FITTED}
            assert policies.build(entry.method, **{**entry.fields, **fitted})
        elif entry.kind == "cache-dit":
            assert CacheDitSettings(**entry.fields)
        elif entry.kind in ("steps", "solver"):
            assert 1 <= entry.fields["steps"] < steps
            assert entry.fields.get("order", 1) in SOLVERS[entry.fields.get("solver", "euler")]


def test_every_method_of_the_issue_takes_part():
    families = {entry.family for entry in suite(250, False)}
    peers = {"fewer steps", "dpmsolver++ 2", "unipc 2", "forecast", "fora", "toca", "duca", "teacache", "taylorseer"}
    assert peers | {"dbcache", "cache-dit", "moeca", "original", "vectorised"} <= families
    assert {entry.group for entry in suite(250, False) if entry.family == "moeca"} == {"paper"}


def test_a_stochastic_sampler_is_compared_with_a_stochastic_solver():
    solvers = {entry.fields["solver"] for entry in suite(50, True) if entry.kind == "solver"}
    assert solvers == {"sde-dpmsolver++"}


def test_families_and_settings_are_chosen_with_the_baselines():
    chosen = choose(suite(20, False), ["fora", "moeca"])
    assert {entry.family for entry in chosen} == {"original", "vectorised", "fora", "moeca"}
    assert choose(suite(20, False), None) == suite(20, False)
    with pytest.raises(ConfigError, match=r"expected families \(fewer steps, .* found fara"):
        choose(suite(20, False), ["fora", "fara"])
    names = [entry.name for entry in choose(suite(20, False), ["taylorseer N=4", "forecast N=3 O=1"])]
    assert names[2:] == ["forecast N=3 O=1", *(f"taylorseer N=4 O={order}" for order in (1, 2, 3, 4))]
    with pytest.raises(ConfigError, match=r"found taylorseer N$"):
        choose(suite(20, False), ["taylorseer N"])
    with pytest.raises(ConfigError, match="found none"):
        choose(suite(20, False), [])


def test_a_policy_file_is_an_entry_of_ours(tmp_path):
    path = tmp_path / "best-3x.yaml"
    path.write_text("policy: moeca\ninterval: 7\n")
    entry = from_file(path, 20, "euler")
    assert (entry.family, entry.label, entry.group, entry.method) == ("ours best", "3x", "ours", "moeca")
    assert entry.fields["interval"] == 7
    assert choose(suite(20, False, [entry]), ["ours"])[-1] == entry
    assert choose(suite(20, False, [entry]), ["fora"])[-1] == entry, "a file that is given is run"
    other = tmp_path / "other" / "best-3x.yaml"
    other.parent.mkdir()
    other.write_text("policy: fora\n")
    with pytest.raises(ConfigError, match=r"two files are called best-3x\.yaml"):
        from_files([path, other], 20, "euler")
    path.write_text("policy: toca\nsteps: 30\n")
    with pytest.raises(ConfigError, match="made for 30 steps, found 20"):
        from_file(path, 20, "euler")


def test_labels_use_the_symbols_of_the_papers():
    assert label({"interval": 4, "order": 1}) == "N=4 O=1"
    assert Entry("fora", label="N=4").name == "fora N=4"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, found 0"),
        ({"samples": 33}, r"samples must be a multiple of batch \(32\), found 33"),
        ({"seed": -1}, "seed must not be negative"),
        ({"sampler": "heun"}, "no sampler is called 'heun'"),
    ],
)
def test_settings_out_of_range_are_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        BenchSettings(**wrong)
