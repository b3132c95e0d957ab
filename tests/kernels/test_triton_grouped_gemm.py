"""The grouped GEMMs against one branch at a time in fp64."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

pytest.importorskip("triton", reason="triton is not installed")
from moeca_fx.kernels.triton_gpu import Tile, Tiles, gated_experts, grouped_mm_experts, plan
from tests.helpers.grids import spread

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXPERTS, UNTOUCHED = 6, -7.0
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
ACTIVATIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


class Case:
    """Token rows, codes and experts; no branch goes to expert 2, and the last expert may be empty too."""

    def __init__(
        self,
        share: float = 0.6,
        tokens: int = 23,
        top_k: int = 5,
        sizes: tuple[int, int] = (48, 32),
        dtype: torch.dtype = torch.float32,
        biased: bool = False,
    ) -> None:
        generator = torch.Generator().manual_seed(4)
        width, inner = sizes

        def normal(*shape: int) -> Tensor:
            return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(dtype).to(DEVICE)

        self.top_k = top_k
        self.x = normal(tokens, width) * width**0.5
        self.gate, self.up = normal(EXPERTS, inner, width), normal(EXPERTS, inner, width)
        self.down = normal(EXPERTS, width, inner)
        self.biases: dict[str, Tensor] = {}
        if biased:
            shapes = {"gate_bias": inner, "up_bias": inner, "down_bias": width}
            self.biases = {name: normal(EXPERTS, size) for name, size in shapes.items()}
        self.code = (torch.rand(tokens, top_k, generator=generator) < share).to(torch.int8).to(DEVICE)
        expert = torch.rand(tokens, EXPERTS - 1, generator=generator).argsort(-1)[:, :top_k]
        self.expert = (expert + (expert >= 2)).to(DEVICE)

    def run(self, row: Tensor | None = None, cache_rows: int | None = None, **options: Any) -> tuple[Tensor, Tensor]:
        count = (cache_rows or self.x.shape[0]) * self.top_k
        feature = torch.full((count, self.x.shape[1]), UNTOUCHED, dtype=self.x.dtype, device=DEVICE)
        norm = torch.full((count,), UNTOUCHED, device=DEVICE)
        order, offsets, _ = plan(self.code, self.expert, EXPERTS)
        options = {"gate": self.gate, "norm": norm, "row": row, **self.biases, **options}
        gated_experts(self.x, order, offsets, self.top_k, up=self.up, down=self.down, feature=feature, **options)
        return feature, norm

    def expected(self, activation: str = "silu", gated: bool = True) -> Tensor:
        """[tokens * k, H] fp64; rows that are reused hold the mark."""
        act, out = ACTIVATIONS[activation], []
        for branch, (code, expert) in enumerate(
            zip(self.code.flatten().tolist(), self.expert.flatten().tolist(), strict=True)
        ):
            if not code:
                out.append(torch.full((self.x.shape[1],), UNTOUCHED, dtype=torch.float64, device=DEVICE))
                continue
            token, none = self.x[branch // self.top_k].double(), torch.zeros(EXPERTS, 1, device=DEVICE)
            bias = {
                name: self.biases.get(name, none)[expert].double() for name in ("gate_bias", "up_bias", "down_bias")
            }
            up = self.up[expert].double() @ token + bias["up_bias"]
            gate = self.gate[expert].double() @ token + bias["gate_bias"]
            inner = act(gate) * up if gated else act(up)
            out.append(self.down[expert].double() @ inner + bias["down_bias"])
        return torch.stack(out)


def _check(case: Case, found: tuple[Tensor, Tensor], expected: Tensor) -> None:
    feature, norm = found
    tolerance = TOLERANCE[case.x.dtype]
    torch.testing.assert_close(feature.double(), expected, rtol=tolerance, atol=tolerance)
    live = expected[:, 0] != UNTOUCHED
    assert (feature[~live] == UNTOUCHED).all() and (norm[~live] == UNTOUCHED).all()
    torch.testing.assert_close(norm[live], torch.linalg.vector_norm(feature[live].float(), dim=-1), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("sizes", "top_k", "share"),
    spread([(48, 32), (115, 115), (40, 72)], [1, 5], [0.0, 1.0, 0.1]),
    ids=str,
)
def test_equals_one_branch_at_a_time(sizes: tuple[int, int], top_k: int, share: float) -> None:
    case = Case(share, top_k=top_k, sizes=sizes)
    _check(case, case.run(), case.expected())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    case = Case(dtype=dtype, biased=True)
    _check(case, case.run(), case.expected())


@pytest.mark.parametrize(("activation", "gated"), spread(list(ACTIVATIONS), [True, False]))
def test_activations_and_biases(activation: str, gated: bool) -> None:
    case = Case(tokens=9, biased=True)
    options = {} if gated else {"gate": None}
    _check(case, case.run(activation=activation, **options), case.expected(activation, gated))


def test_strided_weights() -> None:
    case = Case()
    expected = case.expected()
    case.up = case.up.transpose(1, 2).contiguous().transpose(1, 2)
    case.down = torch.stack([case.down, case.down], 1)[:, 0]
    _check(case, case.run(), expected)


def test_selected_token_rows() -> None:
    case = Case(tokens=4, top_k=3)
    row = torch.tensor([1, 2, 6, 9], device=DEVICE)
    feature, norm = case.run(row=row, cache_rows=11)
    at = (row[:, None] * 3 + torch.arange(3, device=DEVICE)).flatten()
    _check(case, (feature[at], norm[at]), case.expected())
    others = torch.ones(33, dtype=torch.bool, device=DEVICE).index_fill(0, at, False)
    assert (feature[others] == UNTOUCHED).all() and (norm[others] == UNTOUCHED).all()


def test_no_token_rows() -> None:
    case = Case(tokens=0)
    feature, _ = case.run(row=torch.zeros(0, dtype=torch.int64, device=DEVICE), cache_rows=3)
    assert (feature == UNTOUCHED).all()


def test_the_result_does_not_depend_on_the_run() -> None:
    case = Case(dtype=torch.bfloat16)
    assert all(torch.equal(one, other) for one, other in zip(case.run(), case.run(), strict=True))


@pytest.mark.parametrize("tile", [Tile(16, 16, 16, per_sm=1), Tile(64, 32, 64, per_sm=1)])
def test_the_result_does_not_depend_on_the_tiles(tile: Tile) -> None:
    case = Case()
    _check(case, case.run(tiles=Tiles(tile, tile)), case.expected())


@pytest.mark.parametrize(("sizes", "gated"), spread([(48, 32), (40, 72), (115, 48)], [True, False]), ids=str)
def test_weights_through_the_tensor_memory_accelerator(sizes: tuple[int, int], gated: bool) -> None:
    case = Case(sizes=sizes, dtype=torch.float16, biased=True)
    tile = Tile(16, 32, 32, per_sm=1, tma=True)
    options = {} if gated else {"gate": None}
    _check(case, case.run(tiles=Tiles(tile, tile), **options), case.expected(gated=gated))


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_the_path_through_grouped_mm(share: float) -> None:
    case = Case(share, dtype=torch.bfloat16)
    order, offsets, _ = plan(case.code, case.expert, EXPERTS)
    feature = torch.full((case.code.numel(), 48), UNTOUCHED, dtype=torch.bfloat16, device=DEVICE)
    grouped_mm_experts(case.x, order, offsets, case.top_k, case.gate, case.up, case.down, feature)
    torch.testing.assert_close(feature.double(), case.expected(), rtol=2e-2, atol=2e-2)
