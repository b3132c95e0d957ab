"""docs/recommend.py writes policies that load and run."""

import subprocess
import sys
from pathlib import Path

import pytest

from moeca_fx import policies

SCRIPT = Path(__file__).parents[2] / "docs" / "recommend.py"


@pytest.mark.slow
def test_policies_of_both_levels(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "digits", "--steps", "8", "--batch", "4", "--tries", "2"]
    subprocess.run([*command, "--levels", "output", "branch", "--out", str(tmp_path)], check=True)
    folder = tmp_path / "digits" / "euler-8"
    for speedup in (2, 3, 4, 6):
        best = policies.load(folder / f"best-{speedup}x.yaml")
        assert best.method == "calibrated" and len(best.as_dict()["full"]) == max(2, 8 // speedup)
    assert policies.load(folder / "branch-2x.yaml").method == "branch_forecast"
