"""docs/update_performance.py: runs of some sections renew these alone."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "docs" / "update_performance.py"
script = runpy.run_path(str(SCRIPT))
NUMBERS = json.loads((SCRIPT.parent / "bench-cpu.json").read_text())
PAGE = (SCRIPT.parent / "performance.md").read_text()


def _doubled(numbers: Any) -> Any:
    if isinstance(numbers, dict):
        return {key: _doubled(value) for key, value in numbers.items()}
    return 2 * numbers if isinstance(numbers, float) else numbers


def test_the_page_shows_the_numbers_beside_it() -> None:
    assert script["render"](PAGE, NUMBERS) == PAGE
    exported = json.loads((SCRIPT.parent / "bench-export.json").read_text())
    assert script["render"](PAGE, exported) == PAGE


@pytest.mark.parametrize("section", ["storage", "trajectories", "layers", "transform", "steps"])
def test_a_run_of_one_section(section: str) -> None:
    found: dict[str, Any] = {
        "date": "1999-12-31",
        "machine": NUMBERS["machine"] | {"processor": "Abacus"},
        "minutes": 1,
    }
    found[section] = _doubled(NUMBERS[section])
    page = script["render"](PAGE, found)
    assert page != PAGE
    assert ("Abacus" in page) == (section == "steps"), "the heading is of the steps"
    numbers = script["merged"](NUMBERS, found)
    assert numbers[section] == found[section] and numbers["machines"][section]["processor"] == "Abacus"
    assert (numbers["date"] == "1999-12-31") == (section == "steps")
    for other in {"steps", "layers", "trajectories", "transform", "storage"} - {section}:
        assert numbers[other] == NUMBERS[other] and numbers["machines"][other] == NUMBERS["machines"][other]
    assert script["render"](page, numbers) == page
