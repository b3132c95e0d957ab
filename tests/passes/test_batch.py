"""The batch rule: which size and which axis of each input runs over the samples."""

from typing import Any

import pytest
import torch

from moeca_fx.batch import at_least_two, batch_axis, batch_size
from moeca_fx.errors import InputError


def _zeros(*shapes: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.zeros(shape) for shape in shapes)


CASES: dict[str, tuple[tuple[Any, ...], int]] = {
    "latents and timesteps": (_zeros((3, 4, 8, 8), (3,)), 3),
    "a scalar timestep": ((*_zeros((3, 4, 8, 8)), torch.tensor(1.0)), 3),
    "text of many layers in one tensor": (_zeros((2, 4, 8, 8), (2,), (48, 2, 6, 20), (2, 12)), 2),
    "the same, text first": (_zeros((48, 2, 6, 20), (2, 4, 8, 8), (2,)), 2),
    "a list of many tensors has one vote": ((*_zeros((2, 16, 4), (2, 9)), list(_zeros(*[(7, 2, 6)] * 5))), 2),
    "a tie goes to the timesteps": (_zeros((48, 6, 20), (2, 16, 4), (2,)), 2),
    "a tie without any goes to the first": (_zeros((2, 16, 4), (48, 20)), 2),
    "vectors alone": (_zeros((5,), (5,), (2,)), 5),
}


@pytest.mark.parametrize("case", CASES)
def test_batch_size(case: str) -> None:
    inputs, size = CASES[case]
    assert batch_size(inputs, {}) == size
    assert batch_size((), {str(index): value for index, value in enumerate(inputs)}) == size


def test_no_batch() -> None:
    with pytest.raises(InputError, match="at least one tensor with a leading batch dimension"):
        batch_size((1, torch.tensor(2.0)), {})


@pytest.mark.parametrize(
    ("shape", "size", "axis"),
    [
        ((2, 4, 8, 8), 2, 0),
        ((2,), 2, 0),
        ((48, 2, 6, 20), 2, 1),
        ((48, 1, 6, 20), 1, 1),
        ((48, 1, 1, 20), 1, None),  # a table that broadcasts
        ((64, 2, 16), 2, None),  # three dimensions: a rotary table, not a stack
        ((7, 3), 2, None),
        ((), 2, None),
    ],
)
def test_batch_axis(shape: tuple[int, ...], size: int, axis: int | None) -> None:
    assert batch_axis(torch.zeros(shape), size) == axis


def test_what_is_no_tensor_has_no_axis() -> None:
    assert batch_axis(2, 2) is None and batch_axis("text", 1) is None


def test_a_batch_of_one_is_doubled_along_its_axis() -> None:
    latents, text, table = at_least_two(_zeros((1, 4, 8, 8), (48, 1, 6, 20), (64, 1, 16)), {})[0]
    assert latents.shape[0] == 2 and text.shape == (48, 2, 6, 20) and table.shape == (64, 1, 16)
