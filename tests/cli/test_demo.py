"""``moeca-fx demo`` in a few steps: the numbers, the files, the table, and its errors."""

import json
import math
import time

import pytest
import torch
from PIL import Image

from moeca_fx import zoo
from moeca_fx.demo import DemoSettings, VariantResult
from moeca_fx.demo.table import table_cells
from moeca_fx.errors import ConfigError, MoecaError
from moeca_fx.timing import fastest_threads, median_speedup, pinned_threads, time_interleaved
from tests.helpers.grids import slow
from tests.helpers.zoo_models import shallow_digits

QUICK = ("--steps", "9", "--batch", "10", "--repeats", "2", "--interval", "3")


@pytest.fixture(params=["two blocks", slow("as it is")])
def quick_demo(run, project, request, monkeypatch):
    if request.param == "two blocks":
        monkeypatch.setattr(zoo, "build", {"digits": shallow_digits()}.__getitem__)
    result = run("demo", *QUICK, "--out", "shown")
    assert result.exit_code == 0, result.output
    return result, json.loads((project / "shown" / "demo.json").read_text()), project / "shown" / "demo.png"


def test_the_demo_measures_shows_and_writes(quick_demo):
    result, record, picture_path = quick_demo
    original, vectorised, cached = record["variants"]
    assert [variant["name"] for variant in record["variants"]] == ["original", "vectorised", "cached"]
    assert original["speedup"] == original["flops_speedup"] == 1.0
    assert original["psnr"] is None  # infinite: compared with itself
    assert vectorised["psnr"] is None or vectorised["psnr"] > 80
    assert cached["flops_speedup"] > 1.2
    assert 0 < cached["reuse_ratio"] <= 1
    assert cached["cache_bytes"] > 0
    assert record["settings"]["steps"] == 9
    assert record["settings"]["threads"] in (1, 2)  # chosen by running
    assert record["versions"]["torch"] == torch.__version__

    rows = {line.split()[0]: line.split() for line in result.stdout.splitlines() if line.strip()}
    assert rows["cached"][3] == f"{cached['flops_speedup']:.2f}"
    assert "without torch.compile" in " ".join(result.stdout.split())

    with Image.open(picture_path) as picture:
        picture.load()
        assert picture.size[0] > 3 * 400


@pytest.mark.parametrize(
    ("option", "value"),
    [("--interval", 0), ("--steps", 0), ("--batch", -1), ("--repeats", 0), ("--threads", 0)],
)
def test_settings_out_of_range_are_refused(refuse, option, value):
    assert f"{option[2:]} must be at least 1, found {value}" in refuse("demo", option, value)


def test_an_unwritable_folder_is_refused_before_the_work(refuse, project):
    (project / "taken").write_text("a file")
    assert "cannot write into the folder taken" in refuse("demo", "--out", "taken")


def test_a_negative_seed_is_refused():
    with pytest.raises(ConfigError, match="seed must not be negative"):
        DemoSettings(seed=-1)


def test_variants_take_turns_in_rotating_order():
    calls = []

    def variant(name):
        def run():
            calls.append(name)
            return torch.tensor([float(ord(name))])

        return run

    seconds, images = time_interleaved({name: variant(name) for name in "abc"}, repeats=3)
    assert "".join(calls) == "abcbcacab"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert images["b"].item() == ord("b")


def test_a_variant_that_does_not_repeat_itself_is_an_error():
    count = iter(range(2))
    with pytest.raises(MoecaError, match="'leaky' gave other images in round 2"):
        time_interleaved({"leaky": lambda: torch.tensor([next(count)])}, repeats=2)


def test_speedups_are_medians_of_ratios_within_a_round():
    assert median_speedup((10.0, 20.0, 30.0), (5.0, 5.0, 10.0)) == 3.0


def test_threads_are_pinned_and_restored():
    before = torch.get_num_threads()
    with pinned_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_the_fastest_number_of_threads_is_found_by_running():
    def slow_with_two():
        time.sleep(0.02 if torch.get_num_threads() == 2 else 0.0)

    before = torch.get_num_threads()
    assert fastest_threads(slow_with_two, most=2) == 1
    assert fastest_threads(lambda: time.sleep(0.02 / torch.get_num_threads()), most=2) == 2
    assert torch.get_num_threads() == before


def test_table_cells_of_an_exact_variant():
    variant = VariantResult("vectorised", (2.0, 4.0, 3.0), 1.5, 1.0, math.inf, math.inf, 1.0, 0.96875, None, 0)
    assert table_cells(variant) == (
        "vectorised",
        "3.00",
        "1.50",
        "1.00",
        "equal",
        "1.0000",
        "96.9 %",
        "-",
        "-",
    )
    assert variant.as_dict()["psnr"] is None
    assert VariantResult.from_dict(variant.as_dict()) == variant
