"""Compiled code called without Dynamo: the same results, and only where one call tells how."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moeca_fx.runtime.direct import DirectCall


class Layer(nn.Module):
    """Two weights, a result that is an input, plain values, and an input that is written to."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        self.shift = nn.Buffer(torch.tensor([0.5, 0.5, 0.5]))

    def forward(self, x: Tensor, cache: Tensor) -> tuple[Any, ...]:
        cache.copy_(x * self.scale)
        return cache.sum(), "spread", x, x * self.scale + self.shift, None, 3


@pytest.fixture(autouse=True)
def runs_graphs_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: lambda graph, inputs, **_: graph.forward)


def compiled(module: nn.Module, direct: DirectCall) -> Any:
    torch._dynamo.reset()
    unguarded: Any = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    return torch.compile(module.forward, fullgraph=True, dynamic=False, backend=direct.backend, options=unguarded)


def learned(module: nn.Module, *inputs: Any) -> DirectCall:
    direct = DirectCall(module, {})
    with torch.no_grad():
        direct.learn(inputs, compiled(module, direct)(*inputs))
    return direct


def test_other_inputs_give_what_the_module_gives() -> None:
    layer = Layer()
    direct = learned(layer, torch.randn(2, 3), torch.zeros(2, 3))
    assert direct.ready
    x, cache, expected_cache = torch.randn(2, 3), torch.zeros(2, 3), torch.zeros(2, 3)
    with torch.no_grad():
        found, expected = direct(x, cache), layer(x, expected_cache)
    assert found[2] is x
    assert [value for value in found if not isinstance(value, Tensor)] == ["spread", None, 3]
    for one, other in ((cache, expected_cache), (found[0], expected[0]), (found[3], expected[3])):
        assert torch.equal(one, other)


def test_weights_that_move_are_followed() -> None:
    layer = Layer()
    direct = learned(layer, torch.randn(2, 3), torch.zeros(2, 3))
    layer.scale.data = torch.tensor([5.0, 5.0, 5.0])
    with torch.no_grad():
        assert torch.equal(direct(torch.ones(2, 3), torch.zeros(2, 3))[3], torch.full((2, 3), 5.5))


def test_one_tensor_as_two_inputs_tells_nothing() -> None:
    x = torch.randn(2, 3)
    assert not learned(Layer(), x, x).ready


def test_calls_through_dynamo_keep_no_tensors() -> None:
    layer, x = Layer(), torch.randn(2, 3)
    direct = DirectCall(layer, {})
    run = compiled(layer, direct)
    with torch.no_grad():
        direct.learn((x, x), run(x, x))
        later = weakref.ref(run(torch.randn(2, 3), torch.zeros(2, 3))[3])
    assert not direct.ready and later() is None


def test_results_in_a_list_are_left_to_dynamo() -> None:
    class Nested(nn.Module):
        def forward(self, x: Tensor) -> tuple[Any, ...]:
            return x + 1, [x + 2]

    assert not learned(Nested(), torch.ones(2)).ready


def test_sizes_that_the_code_returns_are_left_to_dynamo() -> None:
    direct = DirectCall(nn.Identity(), {})
    x = torch.ones(2)
    direct._seen = ((x,), (x + 1, 2))
    direct.learn((x,), (direct._seen[1][0], 2))
    assert not direct.ready


def test_tensors_of_unknown_origin_are_left_to_dynamo() -> None:
    direct = DirectCall(nn.Identity(), {})
    x = torch.ones(2)
    direct._seen = ((x, torch.ones(2)), (x + 1,))
    direct.learn((x,), (direct._seen[1][0],))
    assert not direct.ready
    direct._seen = ((x,), (x + 1,))
    direct.learn((x,), (torch.ones(2),))
    assert not direct.ready
