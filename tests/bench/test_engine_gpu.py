"""`bench/engine_gpu.py`: what it says without a GPU, and everything but engines and the clock on a CPU."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from moeca_fx.errors import ExportError
from tests.helpers import zoo_models
from tests.helpers.transformed import SOME

pytestmark = pytest.mark.filterwarnings("ignore::moeca_fx.NothingReusedWarning")

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "engine_gpu.py"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script on a CPU: a tiny model, its ONNX form in onnxruntime for engines, every time one millisecond."""
    for name in ("NVIDIA_TF32_OVERRIDE", "MOECA_FX_GPU_KERNELS"):
        monkeypatch.setenv(name, "0")  # the script sets them for its process; undone after the test
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("engine_gpu_bench", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "engine_gpu_bench", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(module, "MODELS", ("digits", "dsmoe-s-e16"))
    monkeypatch.setattr(module, "build_engines", lambda source, made, **options: _copied(source, made))
    monkeypatch.setattr(module, "interleaved", lambda runs, rounds: {name: [_once(run)] for name, run in runs.items()})
    monkeypatch.setattr(module.Job, "model", lambda job, device: (zoo_models.tiny("dsmoe"), zoo_models.inputs()))
    return module


def _copied(source: Path, made: Path) -> None:
    shutil.copytree(source, made, dirs_exist_ok=True)


def _once(run: Callable[[], Any]) -> float:
    run()
    return 1.0


def _job(bench: ModuleType, folder: Path) -> Any:
    return bench.Job("digits", "float32", folder, "tensorrt-rtx", ("8.9",))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2, done.stderr
    assert len(done.stdout.splitlines()) == 1 and "needs an NVIDIA GPU" in done.stdout and "--build-only" in done.stdout


def test_a_model_that_fails_is_reported_and_the_others_go_on(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX, which exists for Linux: the extra tensorrt")

    def build(job: Any, policy: str) -> dict[str, Any]:
        if job.name == "digits":
            raise ExportError("refuses the graph")
        return {"engines": 1, "kind": job.backend, "engine_bytes": 2**21, "inputs": 3, "outputs": 2}

    monkeypatch.setattr(bench, "build", build)
    monkeypatch.setattr(sys, "argv", ["engine_gpu.py", "--build-only", "--out", str(tmp_path / "engine.json")])
    assert bench.main() == 1
    report = json.loads((tmp_path / "engine.json").read_text())
    assert [each["model"] for each in report["models"]] == ["digits", "dsmoe-s-e16"]
    assert report["models"][0]["failed"] == dict.fromkeys(
        ("build moeca", "build none"), "ExportError: refuses the graph"
    )
    assert report["models"][1]["failed"] == {} and report["models"][1]["built"]["none"]["engines"] == 1
    assert {"torch", "onnx", "onnxruntime", "tensorrt-rtx"} <= set(report["environment"])
    out = capsys.readouterr().out
    assert "digits float32: FAILED build moeca" in out and "2 MiB, 3 inputs and 2 outputs" in out
    monkeypatch.setattr(sys, "argv", ["engine_gpu.py", "--build-only", "--model", "dsmoe-s-e16"])
    assert bench.main() == 0


@pytest.mark.parametrize(
    ("checked", "right"),
    [({"passed": True}, True), ({"passed": False}, False), ({"state": "missing"}, True), ({"state": "failed"}, False)],
)
def test_what_is_right(bench: ModuleType, checked: dict[str, Any], right: bool) -> None:
    assert bench.right(checked) == right


@pytest.mark.artefact
def test_everything_but_engines_and_the_clock(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(bench.POLICIES, "moeca", SOME)  # decides on the tiny model
    job = _job(bench, tmp_path)
    entry = bench.model_report(job, 1, (2,), False)
    assert entry["failed"] == {}
    assert list(entry["built"]) == [*bench.POLICIES, bench.GIVEN]
    assert set(entry["checked"]) == {"engine", "engine with given lengths"}
    for checked in entry["checked"].values():
        assert checked["passed"] and checked["steps"] == 36 and checked["statistics_equal"] == [True] * 3
        assert all(0 < own < 1 and own == other for own, other in checked["reuse_ratio_here_and_in_torch"])
    assert {each["state"] for each in entry["providers"].values()} == {"missing"}
    assert all("onnxruntime has no" in each["reason"] for each in entry["providers"].values())
    (timed,) = entry["timed"]
    assert set(timed["of_plain"]) == {"plain", "full", "cached 0%", "cached 10%", "cached 50%"}
    assert all(value == 1.0 for value in timed["of_full_step"].values())
    shares = list(timed["flops_of_full_step"].values())
    assert 0 < shares[0] < shares[1] < shares[2] < 1
    json.dumps(entry)
    bench.tell(entry)

    # What another policy decides is found, and what is there is not built again.
    other, wrong = job.place("onnx", "keep matched"), job.place("engine", "moeca")
    shutil.rmtree(wrong)
    _copied(other, wrong)
    entry = bench.model_report(job, 1, (2,), False)
    assert entry["failed"] == {"engine": "differs from PyTorch, see its numbers"}
    assert "onnx_seconds" not in entry["built"]["moeca"] and entry["checked"]["engine"]["passed"] is False
