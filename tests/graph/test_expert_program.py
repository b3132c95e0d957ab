"""Expert programs: one grouped computation equals running every expert on its own rows."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from moeca_fx.errors import UnsupportedModelError
from moeca_fx.graph.expert_program import build_expert_program
from moeca_fx.graph.expert_stack import stack_in_place
from moeca_fx.ops import branch_plan
from tests.helpers.toys import Wedge

H, INNER, EXPERTS = 8, 12, 4


class Biased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(H, INNER), nn.Linear(INNER, H)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(functional.gelu(self.up(x)))
        return out


class Sliced(nn.Module):
    """Matrices multiplied in two slices, as with `pretraining_tp=2`."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(H, INNER, bias=False), nn.Linear(INNER, H, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        half = INNER // 2
        up = torch.cat([functional.linear(x, part) for part in self.up.weight.split(half, dim=0)], dim=-1)
        first, second = self.down.weight.split(half, dim=1)
        left, right = functional.silu(up).split(half, dim=-1)
        return functional.linear(left, first) + functional.linear(right, second)


class Scaled(nn.Module):
    """Normalises without affine weights, and multiplies by a vector of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(H, INNER, bias=False), nn.Linear(INNER, H)
        self.scale, self.temper = nn.Parameter(torch.randn(H)), nn.Parameter(torch.rand(()))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.up(functional.layer_norm(x, (H,))).tanh() * self.temper) * self.scale
        return out


class Normed(nn.Module):
    """Two norms with weights, one of them with a shift."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(H), nn.RMSNorm(INNER, eps=1e-5)
        self.up, self.down = nn.Linear(H, INNER), nn.Linear(INNER, H)
        for parameter in (self.before.weight, self.before.bias, self.between.weight):
            nn.init.normal_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.between(self.up(self.before(x)).relu()))
        return out


class Multiplied(nn.Module):
    """Written with matmul on transposed, fused and selected weights."""

    def __init__(self) -> None:
        super().__init__()
        self.fused, self.down = nn.Parameter(torch.randn(2, INNER, H)), nn.Parameter(torch.randn(INNER, H))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.fused.unbind(0)
        return (functional.silu(functional.linear(x, gate)) * functional.linear(x, up)) @ self.down


class Headed(nn.Module):
    """Multiplies every head of its hidden state by one vector of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(H, INNER), nn.Linear(INNER, H)
        self.tone = nn.Parameter(torch.randn(INNER // 3))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.up(x).reshape(-1, 3, INNER // 3) * self.tone
        out: Tensor = self.down(heads.reshape(-1, INNER))
        return out


class Selected(nn.Module):
    """Weights cut out by slice and select."""

    def __init__(self) -> None:
        super().__init__()
        self.fused, self.down = nn.Parameter(torch.randn(2 * INNER, H)), nn.Parameter(torch.randn(1, H, INNER))

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.linear(x, self.fused[:INNER]) * functional.linear(x, self.fused[INNER:])
        return functional.linear(hidden, self.down[0])


def _run(kind: Callable[[], nn.Module], ids: list[int]) -> tuple[Tensor, Tensor, nn.Module]:
    """The program's rows in branch order, the loop's, and the program."""
    torch.manual_seed(0)
    experts = [kind() for _ in range(EXPERTS)]
    x, expert = torch.randn(len(ids), H), torch.tensor(ids, dtype=torch.int64)
    expected = torch.empty(len(ids), H)
    with torch.no_grad():
        for row, index in enumerate(ids):
            expected[row] = experts[index](x[row : row + 1])[0]
        stack_in_place(experts)
        program = build_expert_program("layer.experts", experts, torch.zeros(4, H))
        order, offsets = branch_plan(expert, EXPERTS)
        found = torch.empty(len(ids), H)
        found[order] = program(x[order], expert[order], offsets)
    held = {b.untyped_storage().data_ptr() for b in program.buffers()}
    owned = {p.untyped_storage().data_ptr() for module in experts for p in module.parameters()}
    assert held and held <= owned, "the program holds weights of its own"
    return found, expected, program


@pytest.mark.parametrize(
    "kind", [lambda: Wedge(H, INNER), Biased, Sliced, Scaled, Normed, Multiplied, Headed, Selected]
)
@pytest.mark.parametrize("ids", [[3, 0, 3, 1, 0, 3, 1], [2]], ids=["one expert empty", "one row"])
def test_equals_the_loop(kind: Callable[[], nn.Module], ids: list[int]) -> None:
    found, expected, _ = _run(kind, ids)
    torch.testing.assert_close(found, expected)


def test_no_rows() -> None:
    found, _, _ = _run(Biased, [])
    assert found.shape == (0, H)


def test_each_linear_becomes_one_grouped_linear() -> None:
    _, _, program = _run(lambda: Wedge(H, INNER), [0, 1])
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count(torch.ops.moeca.grouped_linear.default) == 3
    assert torch.ops.aten.linear.default not in targets


class _RowsMixed(Biased):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x - x.mean(0))
        return out


class _RowsCompared(Biased):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)
        return out / (x @ x.transpose(0, 1)).sum()


class _OwnConstant(Biased):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", torch.randn(H))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x) + self.offset
        return out


class _FlattenedWeight(Biased):
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(super().forward(x), self.up.weight.reshape(H, INNER)[:, :H])


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (_RowsMixed, "an expert mixes rows"),
        (_RowsCompared, "an expert mixes rows"),
        (_OwnConstant, "'offset' of the experts has no common storage"),
        (_FlattenedWeight, "cannot be vectorised"),
    ],
)
def test_refusals_name_the_place_and_the_reason(kind: Callable[[], nn.Module], reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        _run(kind, [0, 1])
    assert str(caught.value).startswith("layer.experts: ")
