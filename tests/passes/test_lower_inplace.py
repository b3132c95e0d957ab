"""lower_inplace: a cache is written in place when nothing reads its old value afterwards, and only then."""

import operator

import torch
from torch import fx, nn

from moeca_fx.ops import rows
from moeca_fx.passes.lower_inplace import lower_inplace


def _graph(*, read_after: bool = False, through_view: bool = False, returned: bool = False) -> fx.GraphModule:
    """(cache, row, values) -> (written, something read of the old cache)."""
    graph = fx.Graph()
    cache, row, values = (graph.placeholder(name) for name in ("cache_a", "row", "values"))
    early = graph.call_function(operator.mul, (cache, 2.0))
    fresh = graph.call_function(torch.add, (values, graph.call_function(torch.sum, (early,))))
    written = graph.call_function(rows.write_rows, (cache, row, fresh))
    results = [written]
    if read_after:
        results.append(graph.call_function(operator.mul, (cache, 3.0)))
    if through_view:
        view = graph.call_function(rows.tokens_back, (cache, 0, 1))
        results.append(graph.call_function(operator.mul, (view, 3.0)))
    if returned:
        results.append(cache)
    graph.output(tuple(results))
    return fx.GraphModule(nn.Module(), graph)


def _values() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.arange(6.0).view(1, 3, 2), torch.tensor([2]), torch.full((1, 2), 9.0)


def test_the_last_reader_writes_in_place() -> None:
    module = _graph()
    expected = module(*_values())
    assert lower_inplace(module) == 1
    cache, row, values = _values()
    (found,) = module(cache, row, values)
    assert torch.equal(found, expected[0]) and found.data_ptr() == cache.data_ptr()
    assert lower_inplace(module) == 0


def test_a_later_read_of_the_old_value_blocks_it() -> None:
    for options in ({"read_after": True}, {"through_view": True}, {"returned": True}):
        module = _graph(**options)
        expected = module(*_values())
        assert lower_inplace(module) == 0, options
        cache, row, values = _values()
        for have, want in zip(module(cache, row, values), expected, strict=True):
            assert torch.equal(have, want)
        assert torch.equal(cache, _values()[0])


def test_a_write_to_what_is_no_cache_input_stays_functional() -> None:
    graph = fx.Graph()
    x, row, values = (graph.placeholder(name) for name in ("x", "row", "values"))
    doubled = graph.call_function(operator.mul, (x, 2.0))
    graph.output((graph.call_function(rows.write_rows, (doubled, row, values)),))
    assert lower_inplace(fx.GraphModule(nn.Module(), graph)) == 0


def test_two_writes_of_one_cache_are_not_both_lowered() -> None:
    graph = fx.Graph()
    cache, row, values = (graph.placeholder(name) for name in ("cache_a", "row", "values"))
    first, second = (graph.call_function(rows.write_rows, (cache, row, v)) for v in (values, values))
    graph.output((first, graph.call_function(operator.neg, (second,))))
    assert lower_inplace(fx.GraphModule(nn.Module(), graph)) == 0
