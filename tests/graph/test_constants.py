"""KnownValues: numbers that follow from shapes and literals are known in a trace; what an input reaches never is."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from moeca_fx.errors import CaptureError
from moeca_fx.graph.constants import KnownValues
from moeca_fx.passes.follow import check_same_values, known_values, run_following

Function = Callable[[Tensor], Tensor]


class Written(nn.Module):
    """A forward that is one function."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _tiles(x: Tensor) -> Tensor:
    sizes = torch.tensor([x.shape[1] // 4, 2]).unsqueeze(0).repeat(x.shape[0], 1)
    parts = []
    for index, (rows, columns) in enumerate(sizes):
        parts.append(x[index, : rows * columns].reshape(1, rows, columns))  # type: ignore[arg-type]  # as models do
    return torch.cat(parts)


def _written_in_place(x: Tensor) -> Tensor:
    grid = torch.zeros(2, 3)
    grid[..., 1] = grid[..., 1] + torch.arange(1.0, 3.0)
    corner = grid[1]
    corner += 1
    return x[:, : int(grid.sum())]


def _branch_on_a_constant(x: Tensor) -> Tensor:
    return x + 1 if torch.arange(3).sum() > 2 else x - 1


FOLLOWED: dict[str, Function] = {
    "sizes in a tensor": _tiles,
    "written in place and through a view": _written_in_place,
    "a branch": _branch_on_a_constant,
    "a list": lambda x: x[:, : torch.arange(4).tolist()[2]],
    "item": lambda x: x * torch.full((1,), 3).item(),
}


@pytest.mark.parametrize("case", FOLLOWED)
def test_followed_in_a_trace(case: str) -> None:
    model, x = Written(FOLLOWED[case]), torch.randn(2, 8)
    with known_values(model) as known:
        program = torch.export.export(model, (x,), strict=False)
    assert known.unknown == []
    other = torch.randn(2, 8)
    assert torch.equal(program.module(check_guards=False)(other), model(other))


def _spoilt_by_a_write(x: Tensor) -> Tensor:
    count = torch.zeros(1, dtype=torch.int64)
    count[0] = x.argmax()
    return x[:, : int(count)]


def _spoilt_through_a_view(x: Tensor) -> Tensor:
    count = torch.zeros(2, dtype=torch.int64)
    view = count[:1]
    view.copy_(x.argmax().reshape(1))
    return x[:, : int(count[0])]


UNKNOWN: dict[str, Function] = {
    "an input": lambda x: x * int(x.sum()),
    "computed with an input": lambda x: x * int((torch.ones(1) + x.sum())[0]),
    "an input's value written into a constant": _spoilt_by_a_write,
    "written through a view": _spoilt_through_a_view,
    "random": lambda x: x * int(torch.randint(1, 9, (1,))),
    "noise on a constant": lambda x: x * int(torch.ones(1).bernoulli_(0.5)),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_not_known(case: str) -> None:
    known = KnownValues()
    with known:
        UNKNOWN[case](torch.rand(2, 8))
    assert len(known.unknown) == 1 and "test_constants.py" in known.unknown[0]


def test_weights_are_not_known() -> None:
    """They can be loaded anew after the trace."""
    model, known = Written(torch.sin), KnownValues()
    with known:
        int(model.scale * 3)
    assert len(known.unknown) == 1


def test_random_numbers_are_drawn_once() -> None:
    """What is followed draws what it draws without it."""
    torch.manual_seed(0)
    want = torch.rand(3)
    torch.manual_seed(0)
    with KnownValues():
        have = torch.rand(3)
    assert torch.equal(have, want) and torch.rand(1) != want[0]


def test_numbers_of_two_inputs_are_compared() -> None:
    model = Written(_tiles)
    _, first = run_following(model, (), (torch.randn(2, 8),), {})
    _, second = run_following(model, (), (torch.randn(2, 8),), {})
    assert first == second and 4 in first
    check_same_values(model, first, second)
    with pytest.raises(CaptureError, match="another for other values of the inputs: 2 and 3"):
        check_same_values(model, [2, 4], [3, 4])
    with pytest.raises(CaptureError, match="2 and 1 of them"):
        check_same_values(model, [2, 4], [2])
