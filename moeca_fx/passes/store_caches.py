"""store_caches: keep the vectors of the caches in fewer bits; what is computed keeps the model's dtype.

    guess = add(x, cache_attn)                         dense   = decode_rows(cache_attn, cache_attn_scale)
                                                       guess   = add(x, dense)
    new   = write_rows(cache_feature, branch, h)  -->  code, s = encode_rows(h)
    y     = combine_slots(new, weight)                 new     = write_codes(cache_feature, branch, code)
    return y, new                                      scale   = write_rows(cache_feature_scale, branch, s)
                                                       y       = combine_slots(decode_written(new, scale, branch, h), …)
                                                       return y, new, scale

That is fp8: a step computes with the values of this step as they are; only what it reuses was rounded. In bf16, where
rounding is fine, it reads back the rows that it wrote as it stored them, `decode_rows(new)`: a cast that generated code
fuses with what reads it, and that kernels for a CPU do without, for they read and write bf16 where it lies. Writes and
corrections of rows encode those rows alone, and a forecast of rows decodes those alone. Run on the graphs that
`insert_cache` made, while they are functional.
"""

import operator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from moeca_fx.graph.rewrite import call, finish, likened
from moeca_fx.graph.state import StateSpec
from moeca_fx.graph.storage import Storage, stored, stored_states
from moeca_fx.ops import forecast, rows, storage
from moeca_fx.passes.cache.graphs import CachedGraphs, StepGraph

# What changes rows of a cache -> the rows' new values, from their old ones and the operands after the row indices.
_CORRECTIONS = {forecast.add_rows: forecast.corrected_rows, forecast.restart_rows: forecast.restarted_rows}


def store_caches(graphs: CachedGraphs, kept: Storage | None) -> CachedGraphs:
    """Rewrite every step graph, in place, for states that are stored that way; None changes nothing.

    The value that an adaptive schedule's probe compares stays as it is: the change between neighbouring steps, which
    it measures, is of the size of what rounding would add.
    """
    if kept is None or stored_states(graphs.states, kept) == graphs.states:
        return graphs
    return replace(
        graphs,
        full_step=_store(graphs.full_step, graphs.states, kept),
        rules=tuple(_store(rule, graphs.states, kept) for rule in graphs.rules),
        states=stored_states(graphs.states, kept),
    )


def _store(step: StepGraph, states: tuple[StateSpec, ...], kept: Storage) -> StepGraph:
    output = step.module.graph.output_node()
    results = output.args[0]
    assert isinstance(results, tuple), "capture flattens the output to a tuple"
    first = len(results) - len(states) - bool(step.counters)
    after = first + len(states)
    rewriter = _Rewriter(step.module.graph, kept, _inputs(step, kept))
    output.args = ((*results[:first], *results[after:]),)
    with step.module.graph.inserting_before(output):
        pairs = zip(states, results[first:after], strict=True)
        held = [node for state, result in pairs for node in rewriter.result(state, result)]
        rewriter.decode_the_rest()
    own = output.args[0]
    assert isinstance(own, tuple), "no result was added or removed"
    output.args = ((*own[:first], *held, *own[first:]),)
    module = finish(step.module, f"store_caches ({step.name} step)")
    return replace(step, module=module, reads=stored_states(step.reads, kept))


@dataclass(frozen=True)
class _Cache:
    """Inputs that hold a stored state; `dtype` is what it is decoded to."""

    code: fx.Node
    scale: fx.Node | None
    dtype: torch.dtype

    @property
    def parts(self) -> tuple[fx.Node, ...]:
        return (self.code,) if self.scale is None else (self.code, self.scale)


def _inputs(step: StepGraph, kept: Storage) -> dict[fx.Node, _Cache]:
    """The stored states that a step reads, by the input of their codes; inputs for scales are added."""
    graph = step.module.graph
    by_name = {node.name: node for node in graph.find_nodes(op="placeholder")}
    found: dict[fx.Node, _Cache] = {}
    for state in step.reads:
        parts = stored(state, kept)
        if parts == (state,):
            continue
        code, scale = by_name[state.node_name], None
        if kept.scaled:
            with graph.inserting_after(code):
                scale = graph.placeholder(parts[1].node_name)
        found[code] = _Cache(code, scale, state.dtype)
    return found


@dataclass
class _Rewriter:
    """Rewrites one graph; `finish` sorts what it appends into place.

    Attributes:
        caches: stored states that the step reads, by the input of their codes.
        made: nodes that it made, which read codes as codes.
        dense: whole caches decoded, by the input of their codes.
    """

    graph: fx.Graph
    kept: Storage
    caches: dict[fx.Node, _Cache]
    made: set[fx.Node] = field(default_factory=set)
    dense: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def result(self, state: StateSpec, node: fx.Node) -> tuple[fx.Node, ...]:
        """What holds a state after the step: the inputs, the inputs with rows written, or the value encoded."""
        if stored(state, self.kept) == (state,):
            return (node,)
        if node in self.caches:
            return self.caches[node].parts
        if node.target in (rows.write_rows, *_CORRECTIONS) and node.args[0] in self.caches:
            return self._write(node)
        return self._encode(node, node.name)

    def decode_the_rest(self) -> None:
        """What still reads codes as values reads them decoded; forecasts of rows decode those rows alone."""
        for code, cache in self.caches.items():
            for user in [user for user in code.users if user not in self.made]:
                if user.target is forecast.forecast_rows:
                    self._forecast_rows(user)
                    continue
                if code not in self.dense:
                    arguments = (code, cache.scale, cache.dtype)
                    dense = self._call(storage.decode_rows, *arguments, name=f"{code.name}_dense")
                    self.dense[code] = likened(dense, code)
                    code.meta.pop("val", None)  # which was the value's
                user.replace_input_with(code, self.dense[code])

    def _call(self, target: Any, *args: Any, name: str) -> fx.Node:
        node = call(self.graph, target, *args, name=name)
        self.made.add(node)
        return node

    def _encode(self, values: fx.Node, name: str) -> tuple[fx.Node, ...]:
        if not self.kept.scaled:
            return (self._call(storage.narrow_rows, values, name=f"{name}_narrow"),)
        encoded = self._call(storage.encode_rows, values, name=f"{name}_encoded")
        parts = enumerate(("code", "scale"))
        return tuple(self._call(operator.getitem, encoded, index, name=f"{name}_{part}") for index, part in parts)

    def _read_rows(self, code: fx.Node, row: fx.Node) -> fx.Node:
        cache = self.caches[code]
        return self._call(storage.read_rows, code, cache.scale, row, cache.dtype, name=f"{code.name}_rows")

    def _forecast_rows(self, node: fx.Node) -> None:
        clock, row, *codes = map(_node, node.args)
        node.target = forecast.forecast
        node.args = (clock, *(self._read_rows(code, row) for code in codes))

    def _write(self, write: fx.Node) -> tuple[fx.Node, ...]:
        """A write or a correction of rows; what reads the result reads this step's as computed, in bf16 as stored."""
        code, row, *operands = map(_node, write.args)
        cache, name, values = self.caches[code], write.name, operands[0]
        write._rename(f"{name}_before")
        if write.target in _CORRECTIONS:
            old = self._read_rows(code, row)
            values = self._call(_CORRECTIONS[write.target], old, *operands, name=f"{name}_rows")
        fresh, *fresh_scale = self._encode(values, name)
        put = storage.write_codes if self.kept.scaled else rows.write_rows
        parts = [self._call(put, code, row, fresh, name=name)]
        for scale in fresh_scale:
            parts.append(self._call(rows.write_rows, cache.scale, row, scale, name=f"{name}_scale"))
        if self.kept.scaled:
            whole = (storage.decode_written, *parts, row, values, cache.dtype)
        else:
            whole = (storage.decode_rows, parts[0], None, cache.dtype)
        write.replace_all_uses_with(likened(self._call(*whole, name=f"{name}_dense"), write))
        self.graph.erase_node(write)
        return tuple(parts)


def _node(argument: object) -> fx.Node:
    assert isinstance(argument, fx.Node), f"{argument!r}: expected a node"
    return argument
