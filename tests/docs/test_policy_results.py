"""The page of bench results is made from the files that the bench writes, and says where the aim is missed."""

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "docs" / "update_policy_results.py"


def run(speedup, psnr, group="peer", family="fora"):
    quality = {"flops_speedup": speedup, "psnr": psnr, "psnr_median": psnr + 1}
    return {"name": f"{family} N=4", "family": family, "group": group, "quality": quality}


def write_bench(folder, sampler, margin, fid):
    margins = [
        {
            "target": target,
            "ours": "ours best",
            "ours_speedup": target,
            "ours_psnr": 40.0,
            "peer": "fora x",
            "peer_speedup": target,
            "peer_psnr": 40.0 - margin,
            "margin": margin,
            "margin_between": None,
            "margin_median": margin + 0.5,
            "fid_change": fid,
        }
        for target in (2.0, 3.0, 4.0, 6.0)
    ]
    content = {
        "target": "digits",
        "settings": {"steps": 20, "sampler": sampler, "batch": 4, "samples": 8, "seed": 1, "threads": 1},
        "versions": {"torch": "2", "python": "3"},
        "environment": {"cpu_capability": "AVX2"},
        "rows": [run(3.0, 40.0 - margin), run(6.0, 40.0, "ours", "ours best")],
        "margins": margins,
    }
    made = folder / f"digits-{sampler}-20"
    made.mkdir()
    (made / "bench.json").write_text(json.dumps(content))
    (made / "bench.csv").write_text("name\n")
    (made / "quality_vs_flops.png").write_bytes(b"png")


@pytest.fixture
def script(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("update_policy_results", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "results_notes.md").write_text("# Results\n\n<!-- margins -->\n\nThe end.\n")
    monkeypatch.setattr(module, "DOCS", docs)
    return module


def test_the_page_has_a_line_and_a_section_for_every_run(script, tmp_path, monkeypatch):
    bench = tmp_path / "bench"
    bench.mkdir()
    write_bench(bench, "ancestral", 1.5, None)
    write_bench(bench, "euler", 1.5, -0.25)
    monkeypatch.setattr("sys.argv", ["update", str(bench)])
    script.main()
    page = (tmp_path / "docs" / "results.md").read_text()
    lines = page.splitlines()
    euler, ancestral = (next(line for line in lines if f"digits, {name}, 20 |" in line) for name in script.AIM)
    assert euler == "| digits, euler, 20 | 8 |" + " **+1.5** (+2.0) |" * 4 + " -0.25 to -0.25 |"
    assert ancestral == "| digits, ancestral, 20 | 8 |" + " +1.5 (+2.0) |" * 4 + " - |", "its aim is 1 dB"
    assert [line for line in lines if line.startswith("## ")] == [
        "## digits, 20 euler steps",
        "## digits, 20 ancestral steps",
    ]
    assert "| fora | 38.5 (39.5) | 38.5 (39.5) | - | - |" in lines
    assert "| ours best | 40.0 (41.0) | 40.0 (41.0) | 40.0 (41.0) | 40.0 (41.0) |" in lines
    words = "moeca-fx bench digits --steps 20 --sampler euler --batch 4 --samples 8 --threads 1"
    assert f'    {words} --policies "fora N=4" --no-latency' in lines
    assert (tmp_path / "docs" / "results" / "digits-euler-20-quality_vs_flops.png").read_bytes() == b"png"


def test_a_folder_without_runs_is_refused(script, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["update", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"no bench\.json"):
        script.main()
