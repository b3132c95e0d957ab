"""Chunks of a call: its samples in parts that run one after the other, each with caches of its own or without."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_symbols
from torch.utils import _pytree as pytree

from moeca_fx.errors import UnsupportedModelError
from moeca_fx.graph.rewrite import example_value


@dataclass(frozen=True)
class Chunk:
    """Samples `start` to `stop` of a call; `cached` unless they are beyond what the cache may hold."""

    start: int
    stop: int
    cached: bool = True

    @property
    def size(self) -> int:
        """How many samples."""
        return self.stop - self.start


def split_batch(batch: int, cached: int, most: int | None) -> tuple[Chunk, ...]:
    """The first `cached` samples of a call with caches, the others without; at most `most` at once."""
    size = batch if most is None else most
    return tuple(
        Chunk(start, min(start + size, end), with_cache)
        for begin, end, with_cache in ((0, min(cached, batch), True), (min(cached, batch), batch, False))
        for start in range(begin, end, size)
    )


def join(results: Sequence[Any], traced: fx.GraphModule, batch: int | None = None) -> Any:
    """The chunks' results put together along the batch; what is no tensor is the first chunk's.

    Args:
        results: the model's result for every chunk, in order.
        traced: graph of the model, whose outputs say which of them have a batch axis.
        batch: the batch size of that graph where the model's own code fixes it.

    Raises:
        UnsupportedModelError: a tensor without a batch axis, which cannot be put together.
    """
    nodes = traced.graph.output_node().args[0]
    assert isinstance(nodes, tuple), "capture flattens the output to a tuple"
    columns = zip(*(pytree.tree_leaves(result) for result in results), strict=True)
    joined = []
    for index, (node, column) in enumerate(zip(nodes, columns, strict=True)):
        if isinstance(column[0], Tensor):
            _check_batch_axis(index, node, batch)
            joined.append(torch.cat(column))
        else:
            joined.append(column[0])
    return pytree.tree_unflatten(joined, pytree.tree_structure(results[0]))


def _check_batch_axis(index: int, node: Any, batch: int | None) -> None:
    value = example_value(node) if isinstance(node, fx.Node) else None
    shape = value.shape if isinstance(value, Tensor) else ()
    if not shape or not (free_symbols(shape[0]) or shape[0] == batch):
        raise UnsupportedModelError(
            f"output {index} of the model: expected samples along its first axis, found shape "
            f"{tuple(value.shape) if isinstance(value, Tensor) else '()'}; it cannot be put together from chunks: "
            "leave out chunk and cache_limit, or call the model with fewer samples"
        )
