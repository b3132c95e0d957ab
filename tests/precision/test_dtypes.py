"""Models in fp32, bf16 and fp16: proven in their own dtype, equal at full steps, reuse shown."""

from typing import Any

import pytest
import torch
from torch import Tensor

import moeca_fx
from moeca_fx import MoECa
from moeca_fx.discover import discover
from moeca_fx.discover.reference import TOLERANCE
from moeca_fx.runtime.module import TransformedModel
from tests.helpers.grids import slow
from tests.precision.models import KINDS, Kind, inputs_of, model_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EVERYTHING = MoECa(interval=4, tau0=0.0, attention="full", dense_ffn="full", shared_expert="full")
STEPS = 4


def trajectory(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Inputs that drift a little."""
    grid, _ = inputs_of(dtype, seed=5)
    drift = 0.01 * torch.randn(grid.shape, generator=torch.Generator().manual_seed(6)).to(dtype)
    return [(grid + step * drift, torch.full((len(grid),), 0.5 + 0.02 * step, dtype=dtype)) for step in range(STEPS)]


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest, relative to the largest output."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def _pairs() -> list[Any]:
    """In the fast ones, each kind and each dtype occurs."""
    return [
        (pytest.param if k == d else slow)((kind, dtype))
        for k, kind in enumerate(KINDS)
        for d, dtype in enumerate(DTYPES)
    ]


@pytest.fixture(scope="module", params=_pairs(), ids=str)
def pair(request: pytest.FixtureRequest) -> tuple[torch.nn.Module, TransformedModel, torch.dtype]:
    kind, dtype = request.param
    model = model_of(kind, dtype)
    return model, moeca_fx.transform(model, inputs_of(dtype), policy=EVERYTHING, compile=False), dtype


def test_full_steps_equal(pair: tuple[torch.nn.Module, TransformedModel, torch.dtype]) -> None:
    model, fast, dtype = pair
    given = inputs_of(dtype, batch=2, seed=3, clock=0.4)
    with torch.no_grad():
        assert difference(fast(*given), model(*given)) <= TOLERANCE[dtype]


def test_cached_steps_that_recompute_everything_equal(
    pair: tuple[torch.nn.Module, TransformedModel, torch.dtype],
) -> None:
    model, fast, dtype = pair
    fast = fast.with_policy(EVERYTHING)
    with torch.no_grad():
        for given in trajectory(dtype):
            assert difference(fast(*given), model(*given)) <= 2 * TOLERANCE[dtype]
    assert fast.stats().cached_steps == STEPS - 1


def test_reuse(pair: tuple[torch.nn.Module, TransformedModel, torch.dtype]) -> None:
    _, fast, dtype = pair
    reusing = fast.with_policy(MoECa(interval=4, tau0=3.0))
    with torch.no_grad():
        for given in trajectory(dtype):
            assert torch.isfinite(reusing(*given)).all()
    statistics = reusing.stats()
    assert statistics.cached_steps == STEPS - 1
    branches = sum(site.branches for site in statistics.sites if site.branches)
    assert sum(site.recomputed for site in statistics.sites if site.branches) < branches
    kept = [tensor.dtype for tensor in reusing.cache().values() if tensor.is_floating_point() and tensor.dim() > 2]
    assert dtype in kept, "vectors are kept in the model's dtype"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_proof_is_within_the_tolerance_of_the_dtype(kind: Kind, dtype: torch.dtype) -> None:
    (region,) = discover(model_of(kind, dtype), inputs_of(dtype), {}).regions
    assert 0 <= region.error <= TOLERANCE[dtype]
    assert region.inline == (kind != "method") and (region.form is not None) == (kind == "stacked")


def test_buffers_of_another_dtype_keep_theirs() -> None:
    model = model_of("block", torch.bfloat16)
    model.pitch = model.pitch.float() * 1.001  # not representable in bf16
    model.storeys[0].valves.float()
    _, clock = inputs_of()
    given = (inputs_of(torch.bfloat16)[0].float(), clock)
    mixed = _Mixed(model)
    fast = moeca_fx.transform(mixed, given, policy=EVERYTHING, compile=False)
    assert fast.inner.pitch.dtype == torch.float32
    with torch.no_grad():
        assert difference(fast(*given), mixed(*given)) <= TOLERANCE[torch.bfloat16]


class _Mixed(torch.nn.Module):
    """fp32 outside, conditioning included; bf16 from the stream on."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner.eval()
        self.eval()

    def forward(self, grid: Tensor, clock: Tensor) -> Tensor:
        phase = clock[:, None] * self.inner.pitch
        mood = torch.cat([phase.sin(), phase.cos()], dim=-1)
        stream = grid.to(torch.bfloat16)
        for storey in self.inner.storeys:
            first, second = storey.valves(mood).to(stream.dtype).unsqueeze(1).chunk(2, dim=-1)
            stream = stream + first * storey.mixing(storey.level(stream))
            stream = stream + second * storey.layer(storey.level(stream))
        return stream.float()
