"""Parts of a tensor along its last axis, however a model cuts them: split, chunk or slice."""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moeca_fx.graph.rewrite import example_value

aten = torch.ops.aten
SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)


@dataclass(frozen=True)
class Part:
    """The entries `start` .. `end` of the last axis of `source`, which `node` gives."""

    node: fx.Node
    source: fx.Node
    start: int
    end: int


def part_of(node: fx.Node) -> Part | None:
    """What `node` cuts from the last axis of a tensor; None where it does something else."""
    arguments: Any = node.args
    if node.target is operator.getitem and arguments[0].target in SPLITS:
        split, index = arguments
        source, dim = split.args[0], split.args[2] if len(split.args) > 2 else 0
        sizes = [piece.shape[-1] for piece in example_value(split)]
        if _is_last(source, dim) and not split.kwargs and all(isinstance(size, int) for size in sizes):
            return Part(node, source, sum(sizes[:index]), sum(sizes[: index + 1]))
    if node.target is aten.slice.Tensor and len(arguments) <= 4:
        given: list[Any] = [*arguments, *(0, None, None)[len(arguments) - 1 :]]
        source, dim, start, end = given
        size = example_value(source).shape[-1]
        if _is_last(source, dim) and all(isinstance(bound, int | None) for bound in (size, start, end)):
            first, last, _ = slice(start, end).indices(size)
            return Part(node, source, first, last)
    return None


def _is_last(source: fx.Node, dim: int) -> bool:
    return dim in (-1, example_value(source).dim() - 1)
