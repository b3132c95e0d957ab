"""Weights that move: graphs follow them, caches are freed, nothing is traced again."""

import pytest
import torch
from torch import Tensor, nn

import moeca_fx
from moeca_fx.runtime.bindings import Bindings
from moeca_fx.runtime.module import TransformedModel
from tests.helpers.offloading import CpuOffload, add_hook, moved, storages
from tests.precision.models import KINDS, Kind, inputs_of, model_of
from tests.precision.test_dtypes import EVERYTHING, difference


def fast_of(kind: Kind) -> TransformedModel:
    return moeca_fx.transform(model_of(kind), inputs_of(), policy=EVERYTHING, compile=False)


def run(fast: nn.Module) -> list[Tensor]:
    with torch.no_grad():
        return [fast(*inputs_of(clock=0.1 + 0.1 * step)) for step in range(2)]


@pytest.mark.parametrize("kind", KINDS)
def test_graphs_follow_weights_that_moved(kind: Kind) -> None:
    fast = fast_of(kind)
    expected, programs = run(fast), dict(fast._moeca.programs)
    constants = storages(*fast._moeca.graph_modules()) - storages(fast)
    fast._apply(moved)
    assert fast._moeca.programs == programs
    graphs = list(fast._moeca.graph_modules())
    assert storages(*graphs) & storages(fast) and storages(*graphs) <= storages(fast) | constants, "old memory is free"
    assert all(torch.equal(a, b) for a, b in zip(run(fast), expected, strict=True))
    assert fast.stats().full_steps == 2 and fast.stats().cached_steps == 2, "statistics go on"
    with torch.no_grad():
        for parameter in fast.storeys[0].layer.parameters():
            parameter.mul_(1.1)
    changed = model_of(kind)
    changed.load_state_dict(fast.state_dict())
    fast.reset()
    assert difference(run(fast)[0], run(changed)[0]) <= 1e-5 < difference(run(fast)[0], expected[0])


def test_a_hook_on_the_transformed_model() -> None:
    fast = fast_of("block")
    expected = run(fast)
    fast.reset()
    hook = add_hook(fast, CpuOffload())
    assert all(torch.equal(a, b) for a, b in zip(run(fast), expected, strict=True)) and hook.moves == 1
    with torch.no_grad():
        wide = fast(*inputs_of(tokens=5))  # traced with the hook on
        assert difference(wide, model_of("block")(*inputs_of(tokens=5))) <= 1e-5


def test_with_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate", reason="optional: its hook is imitated above")
    fast = fast_of("method")
    expected = run(fast)
    fast.reset()
    _, hook = accelerate.cpu_offload_with_hook(fast, torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(run(fast), expected, strict=True))
    hook.offload()
    fast.reset()
    assert all(torch.equal(a, b) for a, b in zip(run(fast), expected, strict=True))


def test_weights_that_do_not_lie_together_any_more_are_told() -> None:
    class Halves(nn.Module):
        def __init__(self, whole: Tensor) -> None:
            super().__init__()
            self.first, self.second = (nn.Parameter(half) for half in whole.chunk(2))

    whole = torch.randn(4, 3)
    graph = nn.Module()
    graph.register_buffer("whole", whole)
    model = Halves(whole)
    bindings = Bindings(model, [graph])
    assert bindings.follow(model) and torch.equal(graph.whole, whole)
    model._apply(moved)
    assert not bindings.follow(model) and torch.equal(graph.whole, whole), "and nothing is changed"
