"""Products in slices become whole where the slices are all of a weight, in order; otherwise they stay."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from moeca_fx.graph.expert_program import build_expert_program
from moeca_fx.graph.expert_stack import stack_in_place
from moeca_fx.ops.grouped_linear import grouped_linear

H, INNER = 8, 12
Cut = Callable[[nn.Module, Tensor], Tensor]


class Expert(nn.Module):
    """What `cut` computes with one matrix in and one out."""

    def __init__(self, cut: Cut) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(INNER, H)), nn.Parameter(torch.randn(H, INNER))
        self.bias = nn.Parameter(torch.randn(INNER // 2))
        self.cut = cut

    def forward(self, x: Tensor) -> Tensor:
        return self.cut(self, x)


def _products(cut: Cut) -> int:
    """Products in the program of three such experts, which `build_expert_program` proves equal to them."""
    torch.manual_seed(0)
    experts = [Expert(cut) for _ in range(3)]
    stack_in_place(experts)
    program = build_expert_program("layer.experts", experts, torch.randn(4, H))
    return len(program.graph.find_nodes(op="call_function", target=grouped_linear._opoverload))


def _outputs(x: Tensor, parts: list[Tensor]) -> Tensor:
    return torch.cat([linear(x, part) for part in parts], -1)


def _inputs(hidden: Tensor, weight: Tensor, size: int, order: list[int]) -> Tensor:
    left, right = hidden.split(size, -1), weight.split(size, 1)
    total = linear(left[order[0]], right[order[0]])
    for index in order[1:]:
        total = total + linear(left[index], right[index])
    return total


def _whole(m: Expert, x: Tensor, slices: int) -> Tensor:
    size = INNER // slices
    hidden = _outputs(x, list(m.up.split(size))).relu()
    return _inputs(hidden, m.down, size, list(range(slices)))


def _summed_backwards(m: Expert, x: Tensor) -> Tensor:
    return _inputs(linear(x, m.up).relu(), m.down, 4, [2, 0, 1])


@pytest.mark.parametrize("slices", [2, 3, 6])
def test_slices_of_both_kinds(slices: int) -> None:
    assert _products(lambda m, x: _whole(m, x, slices)) == 2  # type: ignore[arg-type]


def test_a_sum_has_no_order() -> None:
    assert _products(_summed_backwards) == 2  # type: ignore[arg-type]


def _swapped(m: Expert, x: Tensor) -> Tensor:
    first, second = m.up.split(INNER // 2)
    return linear(_outputs(x, [second, first]).relu(), m.down)


def _a_part_only(m: Expert, x: Tensor) -> Tensor:
    first, second, _ = m.up.split(4)
    return linear(_outputs(x, [first, second]).relu(), m.down[:, :8])


def _with_bias(m: Expert, x: Tensor) -> Tensor:
    first, second = m.up.split(INNER // 2)
    return linear(torch.cat([linear(x, first, m.bias), linear(x, second)], -1).relu(), m.down)


def _crossed(m: Expert, x: Tensor) -> Tensor:
    (a, b), (v, w) = linear(x, m.up).relu().split(INNER // 2, -1), m.down.split(INNER // 2, 1)
    return linear(a, w) + linear(b, v)


def _uneven(m: Expert, x: Tensor) -> Tensor:
    return _inputs(linear(x, m.up).relu(), m.down, 8, [0, 1])


def _read_twice(m: Expert, x: Tensor) -> Tensor:
    first, second = (linear(x, part) for part in m.up.split(INNER // 2))
    return linear(torch.cat([first, second], -1).relu() * torch.cat([second, second], -1), m.down)


@pytest.mark.parametrize("cut", [_swapped, _a_part_only, _with_bias, _crossed, _uneven, _read_twice])
def test_what_is_no_whole_product_stays(cut: Cut) -> None:
    assert _products(cut) == 3
