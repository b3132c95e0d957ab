"""Autocast: traced, proven and run with the casts of the caller's state, one program a state."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import moeca_fx
import moeca_fx.export
from moeca_fx import MoECa
from moeca_fx.autocast import OFF, Autocast, computed_in
from moeca_fx.discover import discover
from moeca_fx.discover.reference import TOLERANCE
from moeca_fx.errors import ExportError, InputError, UnprovenRegionError
from moeca_fx.runtime.module import TransformedModel
from tests.helpers.toys import Blend, toy, toy_inputs
from tests.precision.models import MethodQuarry, inputs_of, model_of
from tests.precision.test_dtypes import EVERYTHING, difference, trajectory

ALLOWED = TOLERANCE[torch.bfloat16]
Pair = tuple[nn.Module, TransformedModel]


def bf16() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.fixture(scope="module", params=["method", "block", pytest.param("stacked", marks=pytest.mark.slow)])
def inside(request: pytest.FixtureRequest) -> Pair:
    """Transformed inside of the block."""
    model = model_of(request.param)
    with bf16():
        return model, moeca_fx.transform(model, inputs_of(), policy=EVERYTHING, compile=False)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_full_and_recomputed_steps_are_those_of_the_model_under_autocast(inside: Pair) -> None:
    model, fast = inside
    fast = fast.with_policy(EVERYTHING)
    for given in trajectory(torch.float32):
        with bf16():
            found, want = fast(*given), model(*given)
        assert difference(found, want) <= ALLOWED
        assert difference(found, model(*given)) > 0, "the casts are made"
        assert difference(found, want) < difference(want, model(*given)), "nearer than the model without autocast"
    assert fast.stats().cached_steps == len(trajectory(torch.float32)) - 1


def test_reuse_and_what_is_kept(inside: Pair) -> None:
    _, fast = inside
    reusing = fast.with_policy(MoECa(interval=4, tau0=3.0))
    with bf16():
        for given in trajectory(torch.float32):
            assert torch.isfinite(reusing(*given)).all()
    statistics = reusing.stats()
    assert statistics.cached_steps == 3
    assert any(site.recomputed < site.branches for site in statistics.sites)
    kept = {name: tensor.dtype for name, tensor in reusing.cache().items()}
    assert kept["storeys.0.layer.feature"] == torch.bfloat16, "experts give the dtype of autocast"


def test_every_state_has_a_program() -> None:
    model = model_of("block")
    fast = moeca_fx.transform(model, inputs_of(), policy=None, compile=False)
    for _ in range(2):
        assert difference(fast(*inputs_of()), model(*inputs_of())) <= 1e-5
        with torch.inference_mode(), bf16():
            assert difference(fast(*inputs_of()), model(*inputs_of())) <= ALLOWED
            with torch.autocast("cpu", enabled=False):
                assert difference(fast(*inputs_of()), model(*inputs_of())) <= 1e-5
    assert len(fast._moeca.programs) == 2


def test_the_proof_is_of_the_state() -> None:
    """One expert is twice as loud under autocast alone: nothing that was proven outside says so."""
    model = toy(partial(Blend, MoodyQuarry))
    fast = moeca_fx.transform(model, toy_inputs(), policy=None, compile=False)
    assert difference(fast(*toy_inputs()), model(*toy_inputs())) <= 1e-5
    with bf16(), pytest.raises(UnprovenRegionError, match=r"times its routing weight|differs"):
        fast(*toy_inputs())


def test_planted_faults_show_under_autocast() -> None:
    with bf16():
        for boost, found in ((1.0, True), (1.03, False)):
            regions = discover(model_of("method", boost=boost), inputs_of(batch=8, tokens=32), {}).regions
            assert bool(regions) == found, boost


def test_experts_under_an_autocast_that_the_model_enters_are_refused() -> None:
    model = _Within(model_of("block")).eval()
    with pytest.raises(UnprovenRegionError, match=r"under autocast cpu torch\.bfloat16.*off around.*caller") as error:
        moeca_fx.transform(model, inputs_of(), policy=None, compile=False)
    assert error.value.code == "autocast"
    with bf16():  # now the model enters what is there already
        fast = moeca_fx.transform(model, inputs_of(), policy=None, compile=False)
        assert difference(fast(*inputs_of()), model(*inputs_of())) <= ALLOWED


def test_a_model_that_does_not_run_under_autocast_is_refused_by_what_it_raises() -> None:
    class Adding(nn.Module):
        def forward(self, grid: Tensor, clock: Tensor) -> Tensor:
            return torch.zeros(4, 8).index_add(0, torch.arange(4), grid[0, :4, :8] @ torch.eye(8))

    with bf16(), pytest.raises(InputError, match=r"Adding cannot run on the example inputs.*BFloat16"):
        moeca_fx.transform(Adding().eval(), inputs_of(), policy=None, compile=False)


def test_export_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with bf16(), pytest.raises(ExportError, match=r"autocast is on \(cpu torch\.bfloat16\).*dtype='fp16'"):
        moeca_fx.export.to_pt2(model_of("block"), tmp_path / "out", inputs_of())
    assert not (tmp_path / "out").exists()


def test_graphs_compile_whole(inside: Pair) -> None:
    _, fast = inside
    (program,) = [made for key, made in fast._moeca.programs.items() if key[2] != OFF]
    compiled = torch.compile(program.plain, fullgraph=True, backend="eager")
    given = inputs_of(seed=2)
    assert 0 <= difference(compiled(*given)[0], program.plain(*given)[0]) <= ALLOWED / 10


def test_a_state_is_put_back() -> None:
    with bf16():
        with OFF.around():
            assert Autocast.now() == OFF
            with Autocast((("cpu", torch.float16),)).around():
                assert str(Autocast.now()) == "cpu torch.float16" and computed_in(torch.float32) == torch.float16
                assert computed_in(torch.bfloat16) == torch.bfloat16
        assert Autocast.now() == Autocast((("cpu", torch.bfloat16),))
    assert str(Autocast.now()) == "off" and computed_in(torch.float32) == torch.float32


class MoodyQuarry(MethodQuarry):
    def carve(self, grains: Tensor, which: Tensor, share: Tensor) -> Tensor:
        self.boost = 2.0 if torch.is_autocast_enabled("cpu") else 1.0
        return super().carve(grains, which, share)


class _Within(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, grid: Tensor, clock: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            result: Tensor = self.inner(grid, clock)
        return result
