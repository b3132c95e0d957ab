"""Row programs equal the dense graph on the rows they are given, whatever those rows are."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional

from moeca_fx.graph.layout import NotTokenWise, TokenAxes
from moeca_fx.graph.row_program import RowProgram, build_row_program
from moeca_fx.ops import rows
from tests.helpers.graphs import BATCH, TOKENS, WIDTH, Compute, exported, outputs, placeholder, stream

STREAM = TokenAxes(0, 1)
HEADS = TokenAxes(0, 2)
row_lists = st.lists(st.integers(0, BATCH * TOKENS - 1), unique=True).map(sorted)


@dataclass(frozen=True)
class Case:
    """A dense graph, the program made of it, and the values of every node of the dense graph."""

    graph: fx.GraphModule
    program: RowProgram
    values: dict[str, Tensor]

    def check(self, row: list[int]) -> None:
        """The program's results on `row` equal those rows of the dense outputs."""
        index = torch.tensor(row, dtype=torch.int64)
        found = self.program.module(index, *(self.values[node.name] for node in self.program.inputs))
        dense = [self.values[node.name] for node in outputs(self.graph)]
        assert len(found) == len(dense) == len(self.program.axes)
        for have, want, axes in zip(found, dense, self.program.axes, strict=True):
            by_token = rows.tokens_first(want, axes.batch, axes.token, TOKENS).flatten(0, 1)
            assert have.shape == (len(row), *by_token.shape[1:])
            torch.testing.assert_close(have, by_token[index])


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> object:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.values[n.name] = result
        return result


def _case(module: nn.Module, *inputs: Tensor) -> Case:
    graph = exported(module, *inputs)
    program = build_row_program(graph, {placeholder(graph): STREAM}, outputs(graph), TOKENS)
    recorder = _Recorder(graph)
    recorder.run(*inputs)
    return Case(graph, program, recorder.values)


class Modulated(nn.Module):
    """adaLN with a per-sample condition, a per-token table, a fixed rotation, and heads: q, k, v."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.shift = nn.Linear(WIDTH, 2 * WIDTH)
        self.table = nn.Parameter(torch.randn(1, TOKENS, WIDTH))
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.turn = nn.Parameter(torch.randn(TOKENS, WIDTH // 2))

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, ...]:
        scale, shift = self.shift(condition).chunk(2, dim=-1)
        z = self.norm(x) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1) + self.table
        packed = self.qkv(z).reshape(x.shape[0], TOKENS, 3, 2, WIDTH // 2)
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, h, T, d]
        return query * self.turn, key * self.turn, value


@pytest.fixture(scope="module")
def modulated() -> Case:
    torch.manual_seed(0)
    return _case(Modulated().requires_grad_(False), stream(), torch.randn(BATCH, WIDTH))


@pytest.mark.parametrize("row", [[], list(range(BATCH * TOKENS)), [0], [4, 5, 14]], ids=str)
def test_no_rows_all_rows_and_few(modulated: Case, row: list[int]) -> None:
    modulated.check(row)


@settings(deadline=None)
@given(row_lists)
def test_random_rows(modulated: Case, row: list[int]) -> None:
    modulated.check(row)


def test_what_does_not_depend_on_tokens_is_computed_once_outside(modulated: Case) -> None:
    targets = [node.target for node in modulated.program.module.graph.nodes]
    assert targets.count(torch.ops.aten.linear.default) == 1  # qkv; the condition's linear stays dense
    assert targets.count(rows.gather_rows) == 1 and rows.gather_samples in targets
    assert rows.gather_tokens in targets


def test_parameters_are_shared_not_copied(modulated: Case) -> None:
    shared = {p.untyped_storage().data_ptr() for p in modulated.graph.parameters()}
    held = [*modulated.program.module.parameters(), *modulated.program.module.buffers()]
    assert held and all(tensor.untyped_storage().data_ptr() in shared for tensor in held)


def test_batches_of_other_sizes(modulated: Case) -> None:
    inputs = (stream(7, seed=3), torch.randn(7, WIDTH))
    recorder = _Recorder(modulated.graph)
    recorder.run(*inputs)
    Case(modulated.graph, modulated.program, recorder.values).check([0, 15, 34])


def _merged(x: Tensor, per_token: Tensor, weight: Tensor) -> Tensor:
    flat = functional.linear((x * per_token).reshape(-1, WIDTH), weight)
    return functional.silu(flat)  # [B * T, 4]


def test_merged_rows_and_a_tensor_of_samples_and_tokens() -> None:
    case = _case(Compute(_merged, weight=torch.randn(4, WIDTH)), stream(), torch.randn(BATCH, TOKENS, 1))
    assert case.program.axes == (TokenAxes(0, 0),)
    for row in ([], [2, 3, 11], list(range(BATCH * TOKENS))):
        case.check(row)


def _through_merged(x: Tensor, condition: Tensor) -> Tensor:
    flat = x.reshape(-1, WIDTH).softmax(-1)
    return flat.view(x.shape) * condition.unsqueeze(1) + condition.mean(-1)[:, None, None]


def test_back_from_merged_rows_to_the_stream() -> None:
    case = _case(Compute(_through_merged), stream(), torch.randn(BATCH, WIDTH))
    for row in ([], [0, 6, 13], list(range(BATCH * TOKENS))):
        case.check(row)


def _after_attention(x: Tensor, weight: Tensor) -> Tensor:
    heads = x.view(-1, TOKENS, 2, WIDTH // 2).transpose(1, 2)
    mixed = functional.scaled_dot_product_attention(heads, heads, heads)
    return functional.linear(mixed.transpose(1, 2).reshape(-1, TOKENS, WIDTH), weight) + x


def test_rows_given_in_place_of_a_node_that_mixes_tokens() -> None:
    graph = exported(Compute(_after_attention, weight=torch.randn(WIDTH, WIDTH)), stream())
    (core,) = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default)
    start, (result,) = placeholder(graph), outputs(graph)
    with pytest.raises(NotTokenWise, match="scaled_dot_product_attention"):
        build_row_program(graph, {start: STREAM}, [result], TOKENS)
    program = build_row_program(graph, {start: STREAM}, [result], TOKENS, given={core: HEADS})
    recorder = _Recorder(graph)
    recorder.run(stream())
    row = torch.tensor([1, 7, 12])
    attended = rows.tokens_first(recorder.values[core.name], 0, 2, TOKENS).flatten(0, 1)[row]  # [M, h, d]
    values = {start: stream(), core: attended}
    (found,) = program.module(row, *(values[node] for node in program.inputs))
    torch.testing.assert_close(found, recorder.values[result.name].flatten(0, 1)[row])
