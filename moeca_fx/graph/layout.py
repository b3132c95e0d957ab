"""Token axes: where the sample and token dimensions of the token stream are in every tensor computed from it.

Starting from roots such as the residual stream [B, T, H], each operation is followed only if it acts on every token
alone; the first one that mixes tokens, or that is not known, stops the analysis with its name. What passes can be run
on a few rows instead of all: that is the proof behind every row program.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moeca_fx.errors import UnsupportedModelError
from moeca_fx.graph.last_axis import SPLITS
from moeca_fx.graph.reshape_groups import follow_reshape
from moeca_fx.graph.rewrite import example_value
from moeca_fx.graph.slicing import RESHAPES

aten = torch.ops.aten
# A prime that stands for the open batch size wherever sizes must be compared as numbers.
BATCH_STANDIN = 1009

KEEPS_AXES = (
    aten.clone.default,
    aten.contiguous.default,
    aten._to_copy.default,
    aten.to.dtype,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
)
_ALONG_DIM = (aten.sort.default, aten.cumsum.default, aten.argsort.default)
_INDEXED = (aten.gather.default, aten.scatter.value, aten.scatter.src)
_CUTS = (*SPLITS, aten.slice.Tensor)
_REMOVES_DIM = (aten.unbind.int, aten.select.int)
_REDUCES = (aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default)
_SOFTMAX = (aten.softmax.int, aten._softmax.default, aten.log_softmax.int)
_MATMULS = (aten.matmul.default, aten.mm.default)
_WHERE_NUMBER = (aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar)
_NORMS = (aten.layer_norm.default, aten.rms_norm.default)


class NotTokenWise(UnsupportedModelError):
    """An operation mixes tokens, or is not known to act on each token alone."""


@dataclass(frozen=True)
class TokenAxes:
    """Positions of the sample axis and the token axis; both are `merged` in one axis after flattening [B, T]."""

    batch: int
    token: int

    @property
    def merged(self) -> bool:
        """Whether one axis runs over all tokens of all samples."""
        return self.batch == self.token

    def as_tuple(self) -> tuple[int, ...]:
        """The distinct axes, sample first."""
        return (self.batch,) if self.merged else (self.batch, self.token)


# The token stream [B, T, H], and attention heads [B, h, T, d].
STREAM = TokenAxes(0, 1)
HEADS = TokenAxes(0, 2)


def propagate(roots: dict[fx.Node, TokenAxes], nodes: Sequence[fx.Node]) -> dict[fx.Node, TokenAxes]:
    """Axes of every node in `nodes` (graph order), which must all depend on `roots`.

    Raises:
        NotTokenWise: with the offending node and operation.
    """
    axes, samples = dict(roots), _samples(roots)
    for node in nodes:
        tokens = {source: axes[source] for source in node.all_input_nodes if source in axes}
        if not isinstance(example_value(node), torch.SymInt | int):
            axes[node] = _step(node, tokens, samples)
    return axes


def _samples(roots: dict[fx.Node, TokenAxes]) -> int:
    """The batch size: a number where the model's own code fixes it."""
    return next((shape_of(node)[have.batch] for node, have in roots.items() if not have.merged), BATCH_STANDIN)


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Shape with the open batch size replaced by a stand-in number; of the first tensor for multi-output nodes."""
    value = example_value(node)
    if isinstance(value, list | tuple):
        value = value[0]
    assert isinstance(value, torch.Tensor), f"{node.name} holds no tensor"
    return tuple(_number(size) for size in value.shape)


def _number(size: Any) -> int:
    if isinstance(size, torch.SymInt):
        expression = size.node.expr
        return int(expression.subs(dict.fromkeys(expression.free_symbols, BATCH_STANDIN)))
    return int(size)


def _step(node: fx.Node, tokens: dict[fx.Node, TokenAxes], samples: int) -> TokenAxes:
    target: Any = node.target
    first = node.args[0] if node.args else None
    # What reads token rows twice (rows times rows, say) relates tokens; indexing checks its operands itself.
    twice = any(isinstance(other, fx.Node) and other in tokens for other in node.args[1:])
    if isinstance(first, fx.Node) and first in tokens and (not twice or target in _INDEXED):
        source, have = first, tokens[first]
        rank = len(shape_of(source))
        if target is aten.expand.default:
            added = len(shape_of(node)) - rank
            return TokenAxes(have.batch + added, have.token + added)
        if target is operator.getitem or target in KEEPS_AXES:
            return have
        if target is aten.linear.default:
            return _keep_if_apart(node, have, [rank - 1])
        if target in _MATMULS and len(node.all_input_nodes) == 2:
            weight: Any = node.args[1]
            if len(shape_of(weight)) == 2:
                return _keep_if_apart(node, have, [rank - 1])
        if target in _NORMS:
            normalized: Any = node.args[1]
            return _keep_if_apart(node, have, range(rank - len(normalized), rank))
        if target in _SOFTMAX or target in _CUTS:
            return _keep_if_apart(node, have, [_dim(node, 2 if target in SPLITS else 1, rank)])
        if target in _REMOVES_DIM:
            return _without_dims(node, have, [_dim(node, 1, rank)])
        if target in _REDUCES:
            return _reduced(node, have, rank)
        if target in RESHAPES:
            return _reshaped(node, have, samples)
        if target is aten.permute.default:
            dims: Any = node.args[1]
            order = [int(dim) % rank for dim in dims]
            return TokenAxes(order.index(have.batch), order.index(have.token))
        if target is aten.transpose.int:
            return _transposed(have, _dim(node, 1, rank), _dim(node, 2, rank))
        if target is aten.unsqueeze.default:
            return _unsqueezed(have, _dim(node, 1, rank + 1))
        if target is aten.squeeze.dim:
            return _without_dims(node, have, [_dim(node, 1, rank)])
        if target is aten.topk.default:
            return _keep_if_apart(node, have, [_dim(node, 2, rank, default=-1)])
        if target in _ALONG_DIM:
            return _keep_if_apart(node, have, [_dim(node, 1, rank, default=-1)])
        if target in _INDEXED:
            return _keep_if_apart(node, _alike(node, tokens), [_dim(node, 1, rank)])
    if target in (aten.cat.default, aten.stack.default):
        return _concatenated(node, tokens)
    if is_pointwise(target):
        return _broadcast(node, tokens)
    raise _refuse(node, "is not known to act on each token alone")


def is_pointwise(target: Any) -> bool:
    """Whether an operation acts on every element alone; torch tags all but the `where` of numbers."""
    return target in _WHERE_NUMBER or torch.Tag.pointwise in getattr(target, "tags", ())


def _refuse(node: fx.Node, why: str) -> NotTokenWise:
    return NotTokenWise(f"operation {node.target} (node {node.name}) {why}")


def _dim(node: fx.Node, position: int, rank: int, default: int = 0) -> int:
    value = node.args[position] if len(node.args) > position else node.kwargs.get("dim", default)
    assert isinstance(value, int), f"{node.name}: a dimension is an int"
    return value % rank


def _keep_if_apart(node: fx.Node, have: TokenAxes, dims: Sequence[int]) -> TokenAxes:
    if set(have.as_tuple()) & set(dims):
        raise _refuse(node, "works across the token or sample axis")
    return have


def _without_dims(node: fx.Node, have: TokenAxes, dims: Sequence[int]) -> TokenAxes:
    _keep_if_apart(node, have, dims)
    return TokenAxes(*(axis - sum(dim < axis for dim in dims) for axis in (have.batch, have.token)))


def _reduced(node: fx.Node, have: TokenAxes, rank: int) -> TokenAxes:
    given: Any = node.args[1] if len(node.args) > 1 else None
    if not given:
        raise _refuse(node, "reduces over all axes")
    dims = [int(dim) % rank for dim in (given if isinstance(given, list | tuple) else [given])]
    keep = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    return _keep_if_apart(node, have, dims) if keep else _without_dims(node, have, dims)


def _transposed(have: TokenAxes, left: int, right: int) -> TokenAxes:
    swap = {left: right, right: left}
    return TokenAxes(swap.get(have.batch, have.batch), swap.get(have.token, have.token))


def _unsqueezed(have: TokenAxes, dim: int) -> TokenAxes:
    return TokenAxes(*(axis + (dim <= axis) for axis in (have.batch, have.token)))


def _concatenated(node: fx.Node, tokens: dict[fx.Node, TokenAxes]) -> TokenAxes:
    parts: Any = node.args[0]
    if any(part not in tokens for part in parts) or len({tokens[part] for part in parts}) != 1:
        raise _refuse(node, "joins tensors that are not all laid out by token alike")
    have, rank = tokens[parts[0]], len(shape_of(parts[0]))
    if node.target is aten.stack.default:
        return _unsqueezed(have, _dim(node, 1, rank + 1))
    return _keep_if_apart(node, have, [_dim(node, 1, rank)])


def _alike(node: fx.Node, tokens: dict[fx.Node, TokenAxes]) -> TokenAxes:
    """Axes shared by all tensor operands of an indexing operation."""
    if len(set(tokens.values())) != 1 or len(tokens) != len(node.all_input_nodes):
        raise _refuse(node, "indexes tensors that are not laid out by token alike")
    return next(iter(tokens.values()))


def _broadcast(node: fx.Node, tokens: dict[fx.Node, TokenAxes]) -> TokenAxes:
    rank = len(shape_of(node))
    aligned = set()
    for source, have in tokens.items():
        shift = rank - len(shape_of(source))
        aligned.add(TokenAxes(have.batch + shift, have.token + shift))
    if len(aligned) != 1:
        raise _refuse(node, "combines tensors whose token axes differ")
    return aligned.pop()


def _reshaped(node: fx.Node, have: TokenAxes, samples: int) -> TokenAxes:
    """Follow the axes through a reshape: kept, merged into one axis, or split again."""
    source: Any = node.args[0]
    old, new = shape_of(source), shape_of(node)
    try:
        return TokenAxes(*follow_reshape(have.as_tuple(), old, new, samples))
    except ValueError as problem:
        raise _refuse(node, str(problem)) from problem
