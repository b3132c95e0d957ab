"""`bench/gpu.py`: its checks in Triton's interpreter, and everything but the clock on a CPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "gpu.py"
KERNELS = {"decide", "plan", "experts", "combine", "attention", "grouped_mm"}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script on a CPU: nothing is captured, every run happens once, and every time is a count of runs."""
    if torch.cuda.is_available():
        pytest.skip("the interpreter's switch was read before, for a GPU")
    spec = importlib.util.spec_from_file_location("gpu_bench", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_bench", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(module, "FRACTIONS", (0.0, 0.4))
    monkeypatch.setattr(module, "captured", lambda run: run)
    monkeypatch.setattr(module, "interleaved", lambda runs, rounds: {name: [_once(runs[name])] for name in runs})
    monkeypatch.setattr(module, "milliseconds", _once)
    monkeypatch.setattr(module, "published", lambda name: module.TINY[0])
    return module


def _once(run: Any) -> float:
    run()
    return 1.0


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False, env=environment
    )


@pytest.mark.slow
def test_every_kernel_is_right_in_the_interpreter() -> None:
    done = _run("--interpret")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {line.split()[2] for line in done.stdout.splitlines()} == KERNELS
    assert "WRONG" not in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    done = _run()
    assert done.returncode == 2 and len(done.stdout.splitlines()) == 1 and "GPU" in done.stdout


def test_times_every_kernel_that_is_right(bench: ModuleType) -> None:
    entry = bench.time_kernels("tiny", 2, quick=False)
    assert {name for name, found in entry["checked"].items() if isinstance(found, float)} == KERNELS
    assert [each["fraction"] for each in entry["experts"]] == [0.0, 0.4]
    assert entry["experts"][0]["share_of_dense_rate"] is None, "no rows, no dense GEMM to compare with"
    assert entry["experts"][1]["share_of_dense_rate"] == entry["experts"][1]["faster_than_grouped_mm"] == 1.0
    assert all(each["not_timed"] == {} and each["site_share_of_full"] == 1.0 for each in entry["experts"])
    assert entry["others"]["combine"]["faster_than_torch"] == 1.0
    assert [each["share_of_dense_time"] for each in entry["others"]["attention"]] == [1.0, 1.0]
    json.dumps(entry)


def test_a_wrong_kernel_is_not_timed(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from moeca_fx.kernels import triton_gpu

    right_sum, right_experts = triton_gpu.combine_slots, triton_gpu.gated_experts

    def wrong_experts(x: Any, *rest: Any, **options: Any) -> None:
        right_experts(x * 1.05, *rest, **options)

    monkeypatch.setattr(triton_gpu, "combine_slots", lambda *arguments: right_sum(*arguments) * 1.05)
    monkeypatch.setattr(triton_gpu, "gated_experts", wrong_experts)
    entry = bench.time_kernels("tiny", 1, quick=True)
    assert "relative error" in entry["checked"]["combine"] and "relative error" in entry["checked"]["experts"]
    assert "kernel_ms" not in entry["others"]["combine"] and "kernel_ms" in entry["others"]["decide"]
    assert all("experts_ms" not in each and "experts" in each["not_timed"] for each in entry["experts"])


@pytest.mark.slow  # two transformed models, in bf16 on a CPU
def test_whole_trajectories(bench: ModuleType) -> None:
    entry = bench.end_to_end("digits", 1, 3, 1)
    assert entry["errors"] == {}
    assert entry["vectorised_relative_difference"] < 0.05
    assert entry["moeca_speedup"] == 1.0 and entry["flops_speedup"] > 1
    assert entry["efficiency"] == pytest.approx(1 / entry["flops_speedup"], abs=1e-3)


def test_a_failing_variant_is_recorded(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import moeca_fx

    def fails(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("no such operator\nand a long trace")

    monkeypatch.setattr(moeca_fx, "transform", fails)
    entry = bench.end_to_end("digits", 2, 2, 1)
    assert entry["errors"] == dict.fromkeys(("vectorised", "moeca"), "RuntimeError: no such operator")
    assert entry["original_ms"] == 1.0 and entry["moeca_speedup"] is None


def test_what_does_not_fit_the_time_is_named(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    done = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench, "environment", lambda: {"device": "none"})
    monkeypatch.setattr(bench, "left", lambda: 50.0 if len(done) < 3 else 10.0)
    monkeypatch.setattr(bench, "time_kernels", lambda *arguments: done.append(arguments) or {"checked": {}})
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "out.json")])
    assert bench.main() == 0
    report = json.loads((tmp_path / "out.json").read_text())
    assert len(report["kernels"]) == 3 and len(report["dropped"]) == len(bench.agenda(False)) - 3
    assert "dit-moe-xl batch 125: 10 s left" in " ".join(report["dropped"])
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
