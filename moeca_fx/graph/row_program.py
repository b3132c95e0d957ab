"""Row programs: the part of a graph between a root and an output, rebuilt to run on a few token rows.

    norm = layer_norm(x)               [B, T, H]         rows  = gather_rows(x, row, 0, 1)   [M, 1, H]
    mod  = norm * scale                [B, 1, H]   -->   norm  = layer_norm(rows)            [M, 1, H]
    qkv  = linear(mod, W)              [B, T, 3H]        scale = gather_samples(scale, row)  [M, 1, H]
    q    = view(qkv, [B, T, h, d])                       ...  view(qkv, [-1, 1, h, d])

Only what `layout` proved to be token-wise gets here, so each row's result equals the dense one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from moeca_fx.graph.layout import TokenAxes, is_pointwise, propagate, shape_of
from moeca_fx.graph.rewrite import attribute, copy_meta, example_value
from moeca_fx.graph.slicing import RESHAPES, ancestors, between
from moeca_fx.ops import rows

aten = torch.ops.aten


@dataclass(frozen=True)
class RowProgram:
    """A graph module ``(row, *inputs) -> one [M, rest] tensor per output``.

    Attributes:
        module: the program.
        inputs: nodes of the dense graph whose values it takes after `row`, in order.
        axes: token axes of each output node in the dense graph, in order.
    """

    module: fx.GraphModule
    inputs: tuple[fx.Node, ...]
    axes: tuple[TokenAxes, ...]


def build_row_program(
    owner: fx.GraphModule,
    roots: Mapping[fx.Node, TokenAxes],
    outputs: Sequence[fx.Node],
    tokens: int,
    given: Mapping[fx.Node, TokenAxes] | None = None,
) -> RowProgram:
    """Rebuild the nodes from the roots to `outputs` on rows.

    Args:
        owner: the dense graph; its parameters are shared, not copied.
        roots: dense tensors laid out by token; rows are gathered from them.
        outputs: nodes to compute.
        tokens: T.
        given: roots whose value arrives as rows [M, rest] already (e.g. the result of row attention).

    Raises:
        NotTokenWise: some operation in between mixes tokens.
    """
    given = given or {}
    starts = {**roots, **given}
    needed = _needed(outputs, set(starts))  # what only leads to the given rows is not computed here
    nodes = [node for node in between(starts, outputs) if node in needed]
    axes = propagate(starts, nodes)
    builder = _Builder(owner, axes, tokens, set(given))
    for node in nodes:
        if node in axes:
            builder.add(node)
    return builder.finish(outputs)


def _needed(outputs: Sequence[fx.Node], stop: set[fx.Node]) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    stack = list(outputs)
    while stack:
        node = stack.pop()
        if node not in seen and node not in stop:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return seen


@dataclass
class _Builder:
    owner: fx.GraphModule
    axes: dict[fx.Node, TokenAxes]
    tokens: int
    given: set[fx.Node]
    graph: fx.Graph = field(default_factory=fx.Graph)
    root: torch.nn.Module = field(default_factory=torch.nn.Module)
    inputs: dict[fx.Node, fx.Node] = field(default_factory=dict)
    made: dict[fx.Node, fx.Node] = field(default_factory=dict)
    constants: dict[fx.Node, fx.Node] = field(default_factory=dict)
    adapted: dict[tuple[fx.Node, TokenAxes, int], fx.Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.row = self.graph.placeholder("row")

    def add(self, node: fx.Node) -> None:
        """Copy one node, its operands on rows and its shape arguments adapted."""
        have = self.axes[node]
        if node.target in RESHAPES:
            args: tuple[Any, ...] = (self._operand(node.args[0], node), self._row_shape(node, have))
            copy = self.graph.call_function(aten.reshape.default, args)
        elif node.target is aten.expand.default:
            sizes = [-1 if axis in have.as_tuple() else size for axis, size in enumerate(shape_of(node))]
            copy = self.graph.call_function(node.target, (self._operand(node.args[0], node), sizes))
        else:
            copy = self.graph.node_copy(node, lambda source: self._operand(source, node))
        copy_meta(node, copy)
        self.made[node] = copy

    def finish(self, outputs: Sequence[fx.Node]) -> RowProgram:
        """Lay the outputs out as [M, rest] and close the module."""
        results = []
        for node in outputs:
            have = self.axes[node]
            value = self._operand(node, node)
            results.append(self.graph.call_function(rows.rows_first, (value, have.batch, have.token)))
        self.graph.output(tuple(results))
        self.graph.eliminate_dead_code()
        self.graph.lint()
        module = fx.GraphModule(self.root, self.graph)
        return RowProgram(module, tuple(self.inputs), tuple(self.axes[node] for node in outputs))

    def _operand(self, source: Any, user: fx.Node) -> Any:
        if not isinstance(source, fx.Node):
            return source
        if source in self.made:
            return self.made[source]
        if source in self.axes:
            self.made[source] = self._root_rows(source)
            return self.made[source]
        if is_pointwise(user.target):
            return self._aligned(source, user)
        return self._constant(source)

    def _root_rows(self, source: fx.Node) -> fx.Node:
        have = self.axes[source]
        if source in self.given:
            return self.graph.call_function(aten.reshape.default, (self._input(source), self._row_shape(source, have)))
        args = (self._input(source), self.row, have.batch, have.token)
        return self.graph.call_function(rows.gather_rows, args)

    def _row_shape(self, node: fx.Node, have: TokenAxes) -> list[int]:
        """Dense shape with the sample axis open and the token axis 1 (merged: the one axis open)."""
        shape = list(shape_of(node))
        shape[have.token] = 1
        shape[have.batch] = -1  # after the token axis: merged, they are one
        return shape

    def _aligned(self, source: fx.Node, user: fx.Node) -> fx.Node:
        """A tensor from outside that broadcasts against token rows: pick each row's sample or token entry."""
        have = self.axes[user]
        value = example_value(source)
        if not isinstance(value, torch.Tensor):
            return self._constant(source)
        rank = len(shape_of(user))
        key = (source, have, rank)
        if key not in self.adapted:
            self.adapted[key] = self._align(source, have, rank)
            copy_meta(source, self.adapted[key])
        return self.adapted[key]

    def _align(self, source: fx.Node, have: TokenAxes, rank: int) -> fx.Node:
        shape = (1,) * (rank - len(shape_of(source))) + shape_of(source)
        batch, token = have.batch, have.token
        per_sample, per_token = shape[batch] != 1, shape[token] != 1
        outside = self._constant(source)
        if not per_sample and not per_token:
            return outside
        if len(shape_of(source)) < rank:
            outside = self.graph.call_function(rows.pad_rank, (outside, rank))
        if have.merged or (per_sample and per_token):
            return self.graph.call_function(rows.gather_rows, (outside, self.row, batch, token))
        if per_sample:
            args: tuple[Any, ...] = (outside, self.row, self.tokens, batch)
            return self.graph.call_function(rows.gather_samples, args)
        return self.graph.call_function(rows.gather_tokens, (outside, self.row, self.tokens, batch, token))

    def _constant(self, source: fx.Node) -> fx.Node:
        """A value from outside, as it is: a parameter and what is computed from parameters only, or an input."""
        if source in self.constants:
            return self.constants[source]
        if source.op == "get_attr":
            name = str(source.target).replace(".", "_")
            _assign(self.root, name, attribute(self.owner, str(source.target)))
            self.constants[source] = self.graph.get_attr(name)
        elif source.op == "call_function" and all(n.op != "placeholder" for n in ancestors([source])):
            self.constants[source] = self.graph.node_copy(source, self._constant)
        else:
            return self._input(source)
        copy_meta(source, self.constants[source])
        return self.constants[source]

    def _input(self, source: fx.Node) -> fx.Node:
        if source not in self.inputs:
            last = list(self.inputs.values())[-1] if self.inputs else self.row
            with self.graph.inserting_after(last):
                self.inputs[source] = self.graph.placeholder(source.name)
        return self.inputs[source]


def _assign(module: torch.nn.Module, name: str, value: Any) -> None:
    if isinstance(value, torch.nn.Parameter):
        module.register_parameter(name, value)
    else:
        module.register_buffer(name, value, persistent=False)
