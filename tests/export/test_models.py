"""The models of the zoo at full size, in onnxruntime and as engines of TensorRT-RTX, in fp32 and fp16."""

from pathlib import Path

import pytest
import torch
from torch import nn

import moeca_fx
from moeca_fx import MoECa
from moeca_fx.export import load, to_onnx, to_tensorrt
from moeca_fx.export.plan import build_plan
from moeca_fx.export.verify import verify

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::moeca_fx.NothingReusedWarning")]

MODELS = ("digits", "dsmoe-s-e48", "dsmoe-s-e16", "dit-moe-s")
POLICY = MoECa(tau0=0.4)  # a lower threshold than the default's, so that scores decide
SIZES = (1, 2, 5)
STEPS = 12


@pytest.mark.parametrize("name", MODELS)
def test_twelve_steps_in_onnxruntime(name: str, tmp_path: Path) -> None:
    model, inputs = moeca_fx.zoo.build(name), tuple(moeca_fx.zoo.example_inputs(name, 2))
    to_onnx(model, tmp_path, inputs, policy=POLICY, batch=SIZES, check=False)
    fast = moeca_fx.transform(model, inputs, policy=POLICY, compile=False)
    artefact = load(tmp_path)
    for batch in SIZES:
        found = verify(artefact, fast, build_plan(fast), SIZES, batches=(batch,), steps=STEPS)
        assert found.passed, f"batch {batch}: {found}"
        mine, theirs = artefact.stats(), fast.stats()
        assert mine.cached_steps == theirs.cached_steps > 0 and mine.branches == theirs.branches
        if found.tied == 0 and found.agreeing == 1:
            assert mine == theirs
        for counted in ("matched_branches", "recomputed_branches"):  # ties move a few
            assert getattr(mine, counted) == pytest.approx(getattr(theirs, counted), rel=0.01)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("name", MODELS)
def test_an_engine_is_built(name: str, dtype: str, tmp_path: Path) -> None:
    model, inputs = moeca_fx.zoo.build(name), tuple(moeca_fx.zoo.example_inputs(name, 2))
    options = {"backend": "tensorrt-rtx", "compute_capabilities": ("8.9",), "batch": SIZES, "dtype": dtype}
    manifest = to_tensorrt(model, tmp_path, inputs, policy=POLICY, check=False, **options)  # type: ignore[arg-type]
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    size = (tmp_path / "model.engine").stat().st_size
    assert size > 0.9 * weights * (0.5 if dtype == "fp16" else 1)
    assert manifest.dtype == {"fp32": "float32", "fp16": "float16"}[dtype]


class _Wide(nn.Module):
    """A toy with a table of more than 2 GB, which a protobuf cannot hold."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.table = nn.Parameter(torch.zeros(2**29 + 2**20), requires_grad=False)  # 2.004 GiB in fp32

    def forward(self, grid: torch.Tensor, clock: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.inner(grid, clock)
        return result + self.table[: result.shape[-1]] + self.table[-1]


def test_weights_of_more_than_2_gb(tmp_path: Path) -> None:
    from tests.helpers.toys import toy, toy_inputs

    model = _Wide(toy()).eval()
    with torch.no_grad():
        model.table[-1] = 0.25
    to_onnx(model, tmp_path, toy_inputs(), policy=MoECa(interval=3, tau0=0.6), batch=SIZES, timestep="clock")
    assert (tmp_path / "weights.data").stat().st_size > 2**31
    assert (tmp_path / "model.onnx").stat().st_size < 2**20
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path)(*toy_inputs(2)), model(*toy_inputs(2)), rtol=1e-4, atol=1e-4)
