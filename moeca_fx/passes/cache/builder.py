"""What the rewrites of all site kinds share while they build a cached step: emitting, writing caches, counting."""

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from moeca_fx.graph.rewrite import call
from moeca_fx.graph.row_program import RowProgram
from moeca_fx.graph.state import SCALES_WITH, Counter
from moeca_fx.ops import rows
from moeca_fx.policies import MoECa


@dataclass
class StepBuilder:
    """A cached step under construction.

    Attributes:
        module: vectorised graph, edited in place.
        policy: the policy.
        cache: graph input of every state, by state name.
        nodes: nodes of the vectorised graph, by name.
        updated: node that holds every state after the step, by state name.
        counters: what is counted, with the node that counts it.
        refreshed: [B, T] mask of the tokens that each MoE site refreshed, by its path.
    """

    module: fx.GraphModule
    policy: MoECa
    cache: dict[str, fx.Node]
    nodes: dict[str, fx.Node]
    updated: dict[str, fx.Node] = field(default_factory=dict)
    counters: list[tuple[Counter, fx.Node]] = field(default_factory=list)
    refreshed: dict[str, fx.Node] = field(default_factory=dict)

    @property
    def graph(self) -> fx.Graph:
        """The graph being edited."""
        return self.module.graph

    def emit(self, target: Any, *args: Any, name: str) -> fx.Node:
        """Append a function call."""
        return call(self.graph, target, *args, name=name)

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

    def write(self, state: str, row: fx.Node, values: fx.Node) -> fx.Node:
        """Write rows into a cache; the result is the state after the step."""
        name = "new_" + state.replace(".", "_")
        self.updated[state] = self.emit(rows.write_rows, self.cache[state], row, values, name=name)
        return self.updated[state]

    def count(self, site: str, kind: str, target: Any, *args: Any) -> None:
        """Count something of a site."""
        name = f"count_{site.replace('.', '_')}_{kind}"
        self.counters.append((Counter(site, kind), self.emit(target, *args, name=name)))
