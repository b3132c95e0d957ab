"""Token axes: followed through every token-wise operation, and each operation that mixes tokens is refused."""

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from moeca_fx.graph.layout import BATCH_STANDIN, NotTokenWise, TokenAxes, propagate, shape_of
from moeca_fx.graph.slicing import between
from tests.helpers.graphs import BATCH, TOKENS, WIDTH, Compute, exported, outputs, placeholder, stream

STREAM = TokenAxes(0, 1)
Function = Callable[..., Tensor]


def _axes(graph: fx.GraphModule, output: int = 0, roots: int = 1) -> TokenAxes:
    starts = {placeholder(graph, index): STREAM for index in range(roots)}
    result = outputs(graph)[output]
    return propagate(starts, between(starts, [result]))[result]


def _export(function: Function, *more: Tensor) -> fx.GraphModule:
    return exported(Compute(function), stream(), *more)


def _export_all(functions: Iterable[Function]) -> fx.GraphModule:
    """One graph with an output for every function: a trace costs more than all checks on it."""
    return _export(lambda x: tuple(function(x) for function in functions))


WEIGHT = torch.randn(12, WIDTH)
FOLLOWED: dict[str, tuple[Function, TokenAxes]] = {
    "pointwise": (lambda x: functional.silu(x) * 2 + x, STREAM),
    "layer norm": (lambda x: functional.layer_norm(x, (WIDTH,)), STREAM),
    "rms norm": (lambda x: functional.rms_norm(x, (WIDTH,)), STREAM),
    "linear": (lambda x: functional.linear(x, WEIGHT), STREAM),
    "matmul with a weight": (lambda x: x @ WEIGHT.t(), STREAM),
    "softmax over features": (lambda x: x.softmax(-1), STREAM),
    "mean over features": (lambda x: x.mean(-1), STREAM),
    "mean kept": (lambda x: x.mean(-1, keepdim=True) + x, STREAM),
    "flatten tokens": (lambda x: x.reshape(-1, WIDTH), TokenAxes(0, 0)),
    "flatten and back": (lambda x: x.reshape(-1, WIDTH).view(x.shape) * 1.5, STREAM),
    "heads": (lambda x: x.view(-1, TOKENS, 2, 4).transpose(1, 2), TokenAxes(0, 2)),
    "packed heads": (lambda x: x.reshape(-1, TOKENS, 2, 2, 2).permute(2, 0, 3, 1, 4).unbind(0)[1], TokenAxes(0, 2)),
    "tokens before samples": (lambda x: x.transpose(0, 1), TokenAxes(1, 0)),
    "a new axis": (lambda x: x.unsqueeze(1), TokenAxes(0, 2)),
    "a new axis and away": (lambda x: x.unsqueeze(-1).squeeze(-1), STREAM),
    "split features": (lambda x: x.chunk(2, dim=-1)[1], STREAM),
    "slice of features": (lambda x: x[..., 2:5], STREAM),
    "one feature": (lambda x: x[..., 3], STREAM),
    "joined features": (lambda x: torch.cat([x, -x], dim=-1), STREAM),
    "stacked": (lambda x: torch.stack([x, -x], dim=1), TokenAxes(0, 2)),
    "top-k over features": (lambda x: x.topk(2, dim=-1).values, STREAM),
    "sorted features": (lambda x: x.sort(dim=-1, descending=True).values, STREAM),
    "running sum of features": (lambda x: x.cumsum(-1), STREAM),
    "chosen features": (lambda x: x.gather(-1, x.argsort(-1)[..., :2]), STREAM),
    "a mask of chosen features": (lambda x: torch.zeros_like(x).scatter(-1, x.topk(2, dim=-1).indices, 1.0), STREAM),
    "another dtype": (lambda x: x.to(torch.float64), STREAM),
    "rotary": (lambda x: torch.cat([-x[..., 4:], x[..., :4]], dim=-1) * torch.ones(TOKENS, 1), STREAM),
}


@pytest.fixture(scope="module")
def followed() -> fx.GraphModule:
    return _export_all(function for function, _ in FOLLOWED.values())


@pytest.mark.parametrize("case", FOLLOWED)
def test_followed(case: str, followed: fx.GraphModule) -> None:
    assert _axes(followed, list(FOLLOWED).index(case)) == FOLLOWED[case][1]


@pytest.fixture(scope="module", params=[1, 3], ids=["one sample", "three samples"])
def fixed(request: pytest.FixtureRequest) -> fx.GraphModule:
    """The same in a graph for one batch size, where the model's own code fixes it."""
    functions = [function for function, _ in FOLLOWED.values()]
    root = stream(request.param)
    program = torch.export.export(Compute(lambda x: tuple(f(x) for f in functions)), (root,), strict=False)
    graph = program.run_decompositions({}).module(check_guards=False)
    assert shape_of(graph.graph.find_nodes(op="placeholder")[0])[0] == request.param
    return graph


@pytest.mark.parametrize("case", FOLLOWED)
def test_followed_with_a_fixed_batch(case: str, fixed: fx.GraphModule) -> None:
    results: tuple[fx.Node, ...] = fixed.graph.output_node().args[0]  # type: ignore[assignment]  # nodes
    output = results[list(FOLLOWED).index(case)]
    root = placeholder(fixed)
    assert propagate({root: STREAM}, between([root], [output]))[output] == FOLLOWED[case][1]


REFUSED: dict[str, tuple[Function, str]] = {
    "softmax over tokens": (lambda x: x.softmax(1), "works across the token or sample axis"),
    "norm over tokens": (lambda x: functional.layer_norm(x, (TOKENS, WIDTH)), "works across the token or sample axis"),
    "linear over tokens": (
        lambda x: functional.linear(x.transpose(1, 2), torch.randn(TOKENS, TOKENS)),
        "works across the token or sample axis",
    ),
    "mean over tokens": (lambda x: x.mean(1), "works across the token or sample axis"),
    "sum over samples": (lambda x: x.sum(0), "works across the token or sample axis"),
    "mean of everything": (lambda x: x.mean(), "is not known to act on each token alone"),
    "matmul with a batch of weights": (
        lambda x: x.transpose(0, 1) @ torch.ones(TOKENS, WIDTH, 2),
        "is not known to act on each token alone",
    ),
    "matmul over tokens": (
        lambda x: x.transpose(1, 2) @ torch.ones(TOKENS, 2),
        "works across the token or sample axis",
    ),
    "matmul across tokens": (lambda x: x @ x.transpose(1, 2), "is not known to act on each token alone"),
    "running sum over tokens": (lambda x: x.cumsum(1), "works across the token or sample axis"),
    "top-k over tokens": (lambda x: x.topk(2, dim=1).values, "works across the token or sample axis"),
    "sorted tokens": (lambda x: x.sort(dim=1).values, "works across the token or sample axis"),
    "tokens chosen by index": (
        lambda x: x.gather(1, x.argsort(-1)[..., :2] % TOKENS),
        "works across the token or sample axis",
    ),
    "roll": (lambda x: x.roll(1, 1), "is not known to act on each token alone"),
    "attention": (
        lambda x: functional.scaled_dot_product_attention(x, x, x),
        "is not known to act on each token alone",
    ),
    "tokens mixed into features": (lambda x: x.reshape(-1, TOKENS * WIDTH), "mixes the token axis with others"),
    "tokens split in a grid": (
        lambda x: torch.cat([x, x], dim=-1).reshape(-1, TOKENS * 2, WIDTH),
        "mixes the token axis with others",
    ),
    "some tokens": (lambda x: x[:, :4], "works across the token or sample axis"),
    "one token": (lambda x: x[:, 0], "works across the token or sample axis"),
    "split tokens": (lambda x: x.split(3, dim=1)[0], "works across the token or sample axis"),
    "join along tokens": (lambda x: torch.cat([x, -x], dim=1), "works across the token or sample axis"),
    "transposed stream added": (
        lambda x: x[..., :TOKENS] + x[..., :TOKENS].transpose(1, 2),
        "combines tensors whose token axes differ",
    ),
}


@pytest.fixture(scope="module")
def refused() -> fx.GraphModule:
    return _export_all(function for function, _ in REFUSED.values())


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, refused: fx.GraphModule) -> None:
    with pytest.raises(NotTokenWise, match=REFUSED[case][1]) as caught:
        _axes(refused, list(REFUSED).index(case))
    assert "operation aten." in str(caught.value) and "(node " in str(caught.value)


def test_join_with_a_tensor_from_outside() -> None:
    with pytest.raises(NotTokenWise, match="joins tensors that are not all laid out by token alike"):
        _axes(_export(lambda x, other: torch.cat([x, other], dim=-1), stream(seed=1)))


def test_two_streams_join() -> None:
    graph = _export(lambda x, z: torch.cat([x, z], dim=-1), stream(seed=1))
    assert _axes(graph, roots=2) == STREAM


def test_tensors_from_outside_broadcast() -> None:
    per_sample = torch.randn(BATCH, WIDTH)
    graph = _export(lambda x, scale: x * scale.unsqueeze(1) + torch.ones(TOKENS, 1), per_sample)
    assert _axes(graph) == STREAM


def test_the_open_batch_is_one_number_in_shapes() -> None:
    graph = exported(Compute(lambda x: x.reshape(-1, WIDTH)), stream())
    assert shape_of(placeholder(graph)) == (BATCH_STANDIN, TOKENS, WIDTH)
    assert shape_of(outputs(graph)[0]) == (BATCH_STANDIN * TOKENS, WIDTH)


def test_merged_axes() -> None:
    assert TokenAxes(0, 0).merged and TokenAxes(0, 0).as_tuple() == (0,)
    assert not STREAM.merged and STREAM.as_tuple() == (0, 1)


def test_a_module_with_parameters() -> None:
    mlp = nn.Sequential(nn.Linear(WIDTH, 4), nn.SiLU(), nn.Linear(4, WIDTH))
    graph = exported(Compute(lambda x, mlp: mlp(x) + x, mlp=mlp), stream())
    start, (result,) = placeholder(graph), outputs(graph)
    assert propagate({start: STREAM}, between([start], [result]))[result] == STREAM
