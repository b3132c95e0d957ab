"""The timestep is found among the inputs, or named, or asked for."""

import pytest
import torch
from torch import Tensor

import moeca_fx
from moeca_fx import MoECa
from moeca_fx.errors import InputError
from tests.helpers.toys import TOKENS, WIDTH, Toy, toy, toy_inputs

TWICE = MoECa(interval=2)


class Reordered(Toy):
    """The timestep comes last, among other small numbers."""

    def forward(self, scale: Tensor, grid: Tensor, label: Tensor, when: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(grid + scale[:, None, None], when) + label[:, None, None]


class Linear(Toy):
    """Embeds its timestep without waves; `first` and `second` look alike."""

    def forward(self, grid: Tensor, first: Tensor, second: Tensor) -> Tensor:  # type: ignore[override]
        mood = (first * 0.5 + second)[:, None].expand(-1, WIDTH)
        out: Tensor = self.storeys[0](grid, mood)
        return out


class NamedT(Linear):
    """The same, with a name of the field."""

    def forward(self, grid: Tensor, t: Tensor, second: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(grid, t, second)


def _seeded(kind: type[Toy]) -> Toy:
    torch.manual_seed(0)
    return kind().eval()


def _found(model: Toy, inputs: tuple[Tensor, ...], timestep: str | int | None = None) -> int | None:
    fast = moeca_fx.transform(model, inputs, policy=TWICE, timestep=timestep)
    return next(iter(fast._moeca.programs.values())).timestep


GRID = torch.randn(2, TOKENS, WIDTH)
FIRST, SECOND = torch.tensor([0.1, 0.1]), torch.tensor([3.0, 4.0])


def test_the_one_that_feeds_waves() -> None:
    inputs = (SECOND, GRID, torch.tensor([1, 2]), FIRST)
    assert _found(_seeded(Reordered), inputs) == 3


def test_by_a_common_name_where_nothing_feeds_waves() -> None:
    assert _found(_seeded(NamedT), (GRID, FIRST, SECOND)) == 1


def test_ambiguous() -> None:
    with pytest.raises(InputError) as caught:
        _found(_seeded(Linear), (GRID, FIRST, SECOND))
    message = str(caught.value)
    assert "cannot tell which input of Linear is the timestep" in message
    assert "candidates are: first, second" in message and "timestep='<parameter name>'" in message


@pytest.mark.parametrize("named", ["second", 2])
def test_named_by_the_user(named: str | int) -> None:
    model = _seeded(Linear)
    fast = moeca_fx.transform(model, (GRID, FIRST, SECOND), policy=TWICE, timestep=named)
    with torch.no_grad():
        for step in (0.0, 0.1, -1.0):  # the last jumps back
            fast(GRID, FIRST, SECOND + step)
    stats = fast.stats()
    assert (stats.full_steps, stats.cached_steps, stats.trajectories) == (2, 1, 2)


@pytest.mark.parametrize("named", ["third", "grid", 0, 3, -1])
def test_names_that_fit_no_small_input(named: str | int) -> None:
    with pytest.raises(InputError, match=f"timestep={named!r}.*the inputs are grid, first, second"):
        _found(_seeded(Linear), (GRID, FIRST, SECOND), named)


def test_without_policy_no_timestep_is_needed() -> None:
    model = _seeded(Linear)
    fast = moeca_fx.transform(model, (GRID, FIRST, SECOND), policy=None)
    with torch.no_grad():
        torch.testing.assert_close(fast(GRID, FIRST, SECOND), model(GRID, FIRST, SECOND))


def test_a_scalar_timestep() -> None:
    class Scalar(Toy):
        def forward(self, grid: Tensor, clock: Tensor) -> Tensor:
            return super().forward(grid, clock.expand(grid.shape[0]))

    model = _seeded(Scalar)
    grid, _ = toy_inputs()
    fast = moeca_fx.transform(model, (grid, torch.tensor(0.1)), policy=TWICE)
    with torch.no_grad():
        found = [fast(grid, torch.tensor(t)) for t in (0.1, 0.2, 0.3)]
        torch.testing.assert_close(found[2], model(grid, torch.tensor(0.3)))
    assert fast.stats().cached_steps == 1


def test_integer_timesteps() -> None:
    model = toy()
    grid, _ = toy_inputs(2)
    fast = moeca_fx.transform(model, (grid, torch.tensor([999, 999])), policy=TWICE)
    with torch.no_grad():
        for step in (999, 995, 991, 999):
            fast(grid, torch.tensor([step, step]))
    stats = fast.stats()
    assert (stats.full_steps, stats.cached_steps, stats.trajectories) == (3, 1, 2)
