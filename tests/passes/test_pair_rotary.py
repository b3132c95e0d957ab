"""pair_rotary: the same values and the same place in memory without the concatenation, and what it leaves alone."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from moeca_fx import MoECa
from moeca_fx.passes.pair_rotary import pair_rotary
from tests.helpers import zoo_models
from tests.helpers.graphs import TOKENS, WIDTH, Compute, exported, stream
from tests.helpers.passes import check_pass
from tests.helpers.transformed import zoo_pair

CAT = torch.ops.aten.cat.default
STACK = torch.ops.aten.stack.default
COS, SIN = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(7))


def _two(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def _sliced(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def _four(x: Tensor) -> Tensor:
    a, b, c, d = x.split(WIDTH // 4, -1)
    return torch.cat([-b, a, -d, c], -1)


def _other_way(x: Tensor) -> Tensor:
    a, b = x.split([WIDTH // 2, WIDTH // 2], 2)
    return torch.cat([b, -a], 2)


@pytest.mark.parametrize("turned", [_two, _sliced, _four, _other_way])
@pytest.mark.parametrize("flipped", [False, True], ids=["", "factors in the other order"])
def test_values_stay_bit_for_bit(turned: Callable[[Tensor], Tensor], flipped: bool) -> None:
    def compute(x: Tensor) -> Tensor:
        return SIN * turned(x) + COS * x if flipped else x * COS + turned(x) * SIN

    graph = exported(Compute(compute), stream())
    check_pass(graph, pair_rotary, [(stream(seed=1),), (stream(5, seed=2),)], {CAT: (1, 0), STACK: (0, 1)})


class _Attention(nn.Module):
    """Heads are split off as views, and merged by one: results have to lie as they did."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        q, k, v = self.qkv(x).view(batch, TOKENS, 3, 2, WIDTH).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = q * COS + _two(q) * SIN, k * COS + _four(k) * SIN
        merged = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return merged.view(batch, TOKENS, 2 * WIDTH)


def test_heads_lie_in_memory_as_before() -> None:
    graph = exported(_Attention(), stream())
    with torch.no_grad():
        counts = {CAT: (2, 0), STACK: (0, 2)}
        check_pass(graph, pair_rotary, [(stream(seed=1),), (stream(5, seed=2),)], counts, tolerance=1e-6)


def _rotated_thirds(x: Tensor) -> Tensor:
    a, b, c, d = x.chunk(4, -1)
    return torch.cat([-b, c, d, a], -1)


def _unlike_signs(x: Tensor) -> Tensor:
    a, b, c, d = x.chunk(4, -1)
    return torch.cat([-b, a, d, -c], -1)


def _unequal(x: Tensor) -> Tensor:
    a, b = x.split([WIDTH // 4, 3 * WIDTH // 4], -1)
    return torch.cat([-b, a], -1)


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: x * COS + _rotated_thirds(x) * SIN,
        lambda x: x * COS + _unlike_signs(x) * SIN,
        lambda x: x * COS + _unequal(x) * SIN,
        lambda x: x * COS + _two(x + 1) * SIN,  # of something else
        lambda x: x * COS + _two(x) * SIN[:, :1],  # one angle a token
        lambda x: x * COS - _two(x) * SIN,
    ],
    ids=["no pairs", "unlike signs", "unequal pieces", "another source", "broadcast", "a difference"],
)
def test_other_concatenations_stay(compute: Callable[[Tensor], Tensor]) -> None:
    check_pass(exported(Compute(compute), stream()), pair_rotary, [(stream(seed=1),)], {CAT: (1, 1), STACK: (0, 0)})


def test_a_turned_copy_that_is_read_elsewhere_stays() -> None:
    def compute(x: Tensor) -> Tensor:
        turned = _two(x)
        return (x * COS + turned * SIN) * turned.mean()

    check_pass(exported(Compute(compute), stream()), pair_rotary, [(stream(seed=1),)], {CAT: (1, 1), STACK: (0, 0)})


def test_a_batch_inside_the_tokens_stays() -> None:
    """Merged by a view, which needs the sum to lie as the model's transposition left it."""

    def compute(x: Tensor) -> Tensor:
        inside = x.transpose(0, 1).contiguous().transpose(0, 1)  # [B, T, H] of [T, B, H]
        turned = inside * COS + _two(inside) * SIN
        return turned.transpose(0, 1).view(TOKENS, -1).transpose(0, 1)

    examples = [(stream(seed=1),), (stream(5, seed=2),)]
    check_pass(exported(Compute(compute), stream()), pair_rotary, examples, {CAT: (1, 1), STACK: (0, 0)})


def test_refreshed_rows_too() -> None:
    _, fast = zoo_pair("dsmoe", MoECa(tau0=0.6))
    graphs = fast._moeca.prepare(fast, zoo_models.inputs(), {}).graphs
    assert graphs is not None
    programs = [child for child in graphs.cached.children() if isinstance(child, torch.fx.GraphModule)]
    targets = [node.target for program in programs for node in program.graph.nodes]
    assert STACK in targets and CAT not in targets
