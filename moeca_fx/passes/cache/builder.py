"""What all levels share while they build a step: emitting, reading and writing caches and forecasts, counting."""

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from torch import fx

from moeca_fx.graph.rewrite import call, likened
from moeca_fx.graph.row_program import RowProgram
from moeca_fx.graph.state import SCALES_WITH, Counter, older
from moeca_fx.ops import forecast as forecasts
from moeca_fx.ops import rows, slots


@dataclass
class StepBuilder:
    """A full step, or a step of one rule, under construction.

    Attributes:
        module: vectorised graph, edited in place.
        cache: graph input of every state that the step reads, by state name.
        nodes: nodes of the vectorised graph, by name.
        clock: graph input of the step's clock, where it has one.
        force: graph input [] bool, where the step has one: whether to recompute everything, as a full step does.
        terms: how many values of full steps a forecast sums; 1 holds the last one.
        updated: node that holds every state after the step, by state name.
        counters: what is counted, with the node that counts it.
        refreshed: [B, T] mask of the tokens that each MoE site refreshed, by its path.
    """

    module: fx.GraphModule
    cache: dict[str, fx.Node]
    nodes: dict[str, fx.Node]
    clock: fx.Node | None = None
    force: fx.Node | None = None
    terms: int = 1
    updated: dict[str, fx.Node] = field(default_factory=dict)
    counters: list[tuple[Counter, fx.Node]] = field(default_factory=list)
    refreshed: dict[str, fx.Node] = field(default_factory=dict)
    _forecasts: dict[str, fx.Node] = field(default_factory=dict)
    _rows: dict[fx.Node, fx.Node] = field(default_factory=dict)

    @property
    def graph(self) -> fx.Graph:
        """The graph being edited."""
        return self.module.graph

    def emit(self, target: Any, *args: Any, name: str) -> fx.Node:
        """Append a function call."""
        return call(self.graph, target, *args, name=name)

    def replace(self, node: fx.Node, value: fx.Node) -> None:
        """Let `value` stand for what a node of the model computes."""
        node.replace_all_uses_with(likened(value, node))

    def unpack(self, value: fx.Node, *names: str) -> tuple[fx.Node, ...]:
        """One node for each item of a tuple result."""
        return tuple(self.emit(operator.getitem, value, index, name=name) for index, name in enumerate(names))

    def run_program(
        self,
        program: RowProgram,
        row: fx.Node,
        name: str,
        outputs: tuple[str, ...],
        counter: Counter,
        given: Mapping[fx.Node, fx.Node] | None = None,
    ) -> tuple[fx.Node, ...]:
        """Call a row program, whose work grows with `counter`; one [M, rest] node an output.

        Args:
            given: dense node -> node that holds its rows.
        """
        values = given or {}
        self.module.add_submodule(name, program.module)
        inputs = [values.get(node, node) for node in program.inputs]
        result = self.graph.create_node("call_module", name, (row, *inputs), name=f"{name}_result")
        result.meta[SCALES_WITH] = counter
        return self.unpack(result, *outputs)

    # -- states -------------------------------------------------------------------------------------------------

    def kept(self, state: str) -> tuple[fx.Node, ...]:
        """The cache inputs of a state and of its older values, the last full step's first."""
        return tuple(self.cache[name] for name in older(state, self.terms))

    def reused(self, state: str) -> fx.Node:
        """The value that stands for one that is not computed: what the cache holds, or its forecast."""
        if self.terms == 1:
            return self.cache[state]
        if state not in self._forecasts:
            assert self.clock is not None, f"{state}: a forecast reads the clock"
            name = "forecast_" + state.replace(".", "_")
            self._forecasts[state] = self.emit(forecasts.forecast, self.clock, *self.kept(state), name=name)
        return self._forecasts[state]

    def store(self, state: str, value: fx.Node) -> None:
        """On a full step: the state takes `value`, and what it held becomes its older value."""
        names = older(state, self.terms)
        self.updated[state] = value
        for newer, name in pairwise(names):
            self.updated[name] = self.cache[newer]

    def select(self, mask: fx.Node, name: str) -> fx.Node:
        """The rows of a mask; sites that refresh the same tokens share them."""
        if mask not in self._rows:
            self._rows[mask] = self.emit(rows.select_rows, mask, name=name)
        return self._rows[mask]

    def forced(self, code: fx.Node) -> fx.Node:
        """A decision [.., k] under `force`, if the step has it."""
        if self.force is None:
            return code
        return self.emit(slots.forced_code, code, self.force, name=f"{code.name}_forced")

    def write(self, state: str, row: fx.Node, values: fx.Node) -> fx.Node:
        """Write rows into a cache that has no older values; the result is the state after the step."""
        name = "new_" + state.replace(".", "_")
        self.updated[state] = self.emit(rows.write_rows, self.cache[state], row, values, name=name)
        return self.updated[state]

    def refresh(self, state: str, row: fx.Node, values: fx.Node) -> fx.Node:
        """Rows were computed anew: this step's dense value. Kept values are corrected by what a forecast missed."""
        if self.terms == 1:
            return self.write(state, row, values)
        base, guess = state.replace(".", "_"), self.reused(state)
        change = self.emit(forecasts.missed, values, guess, row, name=f"missed_{base}")
        for name in older(state, self.terms):
            new = "new_" + name.replace(".", "_")
            self.updated[name] = self.emit(forecasts.add_rows, self.cache[name], row, change, name=new)
        return self.emit(rows.write_rows, guess, row, values, name=f"now_{base}")

    def keep(self, state: str) -> None:
        """The state, older values included, stays as it is."""
        for name in older(state, self.terms):
            self.updated[name] = self.cache[name]

    def count(self, site: str, kind: str, target: Any, *args: Any) -> None:
        """Count something of a site."""
        name = f"count_{site.replace('.', '_')}_{kind}"
        self.counters.append((Counter(site, kind), self.emit(target, *args, name=name)))
