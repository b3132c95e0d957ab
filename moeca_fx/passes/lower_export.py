"""lower_export: a forced step, or the model without caches, in operations that ONNX can hold (`ops.bounded`).

    row = select_rows(mask)                    row, valid = bounded.select_rows(mask)
    c   = write_rows(cache, row, v)            c   = bounded.write_rows(cache, row, v, valid)
    plan, take_rows, experts, write_rows  -->  a table of branches, one batched product an expert's linear (`Experts`)
    attention_rows(q, k, v, row)               the same over rows padded to the fullest sample
    forecast_rows, restart_rows                the same of all branches of the tokens that the table is over
    count_rows(row)                            count_valid(valid)

Afterwards nothing has a length of zero, and no operation gives a different result where entries only fill up.
"""

import copy
import operator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx

from moeca_fx.errors import ExportError
from moeca_fx.graph.rewrite import call, finish
from moeca_fx.ops import bounded, dispatch, forecast, rows, slots
from moeca_fx.ops.attention_rows import attention_rows
from moeca_fx.ops.grouped_linear import grouped_linear
from moeca_fx.passes.slot_decisions import rewrite_decisions
from moeca_fx.policies import branch

Experts = Literal["padded", "unrolled", "dense"]
"""A table padded to the largest group; rows by expert, one product each (ONNX alone); every expert on every row."""


def lower_export(module: fx.GraphModule, experts: Experts = "padded") -> fx.GraphModule:
    """Rewrite a step (`insert_forced_cache`, `insert_cache`) or a vectorised graph in place.

    Raises:
        ExportError: an operation with a length that depends on data has no form for export.
    """
    rewrite_decisions(module)
    finish(module, "slot_decisions")
    lowering = _Lowering(module, experts)
    for node in list(module.graph.nodes):
        lowering.lower(node)
    finished = finish(module, "lower_export")
    _check(finished, experts)
    return finished


@dataclass(frozen=True)
class _Rows:
    """What is known of a node that lists rows: which entries were selected, and from which mask."""

    valid: fx.Node
    mask: fx.Node


@dataclass(frozen=True)
class _Table:
    """A table of branches: the nodes of a plan (`_PLANS`), the decision and the rows it is over."""

    local: fx.Node
    expert: fx.Node
    place: fx.Node
    offsets: fx.Node | None
    code: fx.Node
    row: fx.Node | None


_PLANS = {"padded": bounded.plan_padded, "unrolled": bounded.plan_grouped, "dense": bounded.plan_dense}


@dataclass
class _Lowering:
    module: fx.GraphModule
    experts: Experts
    rows: dict[fx.Node, _Rows] = field(default_factory=dict)
    tables: dict[fx.Node, _Table] = field(default_factory=dict)
    computed: dict[fx.Node, _Table] = field(default_factory=dict)  # what experts computed, by table entry
    taken: dict[fx.Node, fx.Node] = field(default_factory=dict)  # the same in the order of the decision

    def lower(self, node: fx.Node) -> None:
        rule = _RULES.get(node.target)
        if node.op == "call_module":
            rule = _Lowering._run_experts if self._table_of(node) else None
        if rule is not None:
            with self.module.graph.inserting_before(node):
                rule(self, node)

    def _emit(self, target: Any, *args: Any, name: str) -> fx.Node:
        return call(self.module.graph, target, *args, name=name)

    def _replace(self, node: fx.Node, target: Any, *args: Any) -> fx.Node:
        made = self._emit(target, *args, name=node.name)
        node.replace_all_uses_with(made)
        self.module.graph.erase_node(node)
        return made

    def _select(self, node: fx.Node) -> None:
        mask = node.args[0]
        assert isinstance(mask, fx.Node)
        both = self._emit(bounded.select_rows, mask, name=f"{node.name}_and_valid")
        valid = self._emit(operator.getitem, both, 1, name=f"{node.name}_valid")
        self.rows[self._replace(node, operator.getitem, both, 0)] = _Rows(valid, mask)

    def _rows_of_rows(self, node: fx.Node) -> None:
        _, chosen = node.args
        self.rows[node] = self.rows[chosen]  # type: ignore[index]  # a node

    def _plan(self, node: fx.Node) -> None:
        code, slot_expert, row, num_experts = node.args
        assert isinstance(code, fx.Node) and (row is None or isinstance(row, fx.Node))
        if row is not None:
            code = self._only_valid(code, self.rows[row].valid)
        self._pad(node, code, slot_expert, num_experts, row)

    def _plan_all(self, node: fx.Node) -> None:
        """Without a cache every branch is computed."""
        expert, num_experts = node.args
        readers = [user for item in node.users for user in item.users]
        top_k = next(user.args[2] for user in readers if user.target is dispatch.gather_branches)
        expert = self._emit(slots.slots, expert, 1, top_k, name=f"{node.name}_expert")
        code = self._emit(torch.ones_like, expert, name=f"{node.name}_code")
        self._pad(node, code, expert, num_experts, None)

    def _pad(self, node: fx.Node, code: fx.Node, expert: Any, num_experts: Any, row: fx.Node | None) -> None:
        plan = self._emit(_PLANS[self.experts], code, expert, num_experts, name=f"{node.name}_{self.experts}")
        names = ("local", "expert", "place", "offsets")[: 4 if self.experts == "unrolled" else 3]
        parts = [
            self._emit(operator.getitem, plan, index, name=f"{node.name}_{name}") for index, name in enumerate(names)
        ]
        local, row_expert, place, offsets = (*parts, None)[:4]
        assert local is not None and row_expert is not None and place is not None, "every plan gives these"
        self.tables |= dict.fromkeys(node.users, _Table(local, row_expert, place, offsets, code, row))

    def _only_valid(self, code: fx.Node, valid: fx.Node) -> fx.Node:
        """The decision of rows without those that fill up, for every reader of it."""
        masked = self._emit(bounded.valid_code, code, valid, name=f"{code.name}_valid")
        code.replace_all_uses_with(masked, delete_user_cb=lambda user: user is not masked)
        return masked

    def _table_of(self, node: fx.Node) -> _Table | None:
        """The table that an argument of the call was planned with."""
        found = [self.tables[source] for source in node.all_input_nodes if source in self.tables]
        return found[0] if found else None

    def _take(self, node: fx.Node) -> None:
        table = self._table_of(node)
        if table is not None:
            node.args = (node.args[0], table.local)

    def _gather(self, node: fx.Node) -> None:
        table = self._table_of(node)
        assert table is not None, f"{node.name}: rows of branches follow a plan"
        self._replace(node, dispatch.take_rows, node.args[0], table.local)

    def _ungroup(self, node: fx.Node) -> None:
        table = self._table_of(node)
        assert table is not None, f"{node.name}: branches are put back by the plan that they were grouped by"
        self._replace(node, dispatch.take_rows, node.args[0], table.place)

    def _run_experts(self, node: fx.Node) -> None:
        table = self._table_of(node)
        assert table is not None and isinstance(node.target, str), f"{node.name}: experts follow a plan"
        if table.offsets is None:
            name = f"{node.target}_padded"
            self.module.add_submodule(name, _padded_experts(self.module.get_submodule(node.target)))
            node.target = name
        node.args = (node.args[0], table.expert, table.offsets)
        self.computed[node] = table

    def _write(self, node: fx.Node) -> None:
        cache, row, values = node.args
        assert isinstance(row, fx.Node)
        table = self.tables.get(row)
        if table is not None and values in self.computed:
            self._replace(node, bounded.write_computed, cache, values, table.place, table.code, table.row)
        elif table is not None:
            self._replace(node, bounded.write_branches, cache, values, table.code, table.row)
        elif row in self.rows:
            self._replace(node, bounded.write_rows, cache, row, values, self.rows[row].valid)

    def _add(self, node: fx.Node) -> None:
        cache, row, change = node.args
        valid = self.rows[row].valid  # type: ignore[index]  # a node
        self._replace(node, bounded.add_rows, cache, row, change, valid)

    def _forecast(self, node: fx.Node) -> None:
        """A forecast of recomputed branches: of all branches of their tokens."""
        clock, row, *caches = node.args
        table = self.tables[row]  # type: ignore[index]  # a node
        self.tables[self._replace(node, bounded.forecast_branches, clock, table.row, *caches)] = table

    def _subtract(self, node: fx.Node) -> None:
        """What a forecast of branches missed, laid out as that forecast."""
        values, guess = node.args
        table = self.tables.get(guess)  # type: ignore[arg-type]  # a node, or not to be found
        if table is not None:
            node.args = (self._taken(values), guess)

    def _measure(self, node: fx.Node) -> None:
        """Norms of branches that experts computed, by table entry; a dense table has too many of them."""
        values = node.args[0]
        assert isinstance(values, fx.Node)
        if self.experts == "dense":
            node.args = (self._taken(values),)
        elif values in self.computed:
            self.computed[node] = self.computed[values]

    def _taken(self, values: Any) -> fx.Node:
        """What experts computed in the order of the decision; all else is so already."""
        table = self.computed.get(values)
        if table is None:
            return values  # type: ignore[no-any-return]  # a node
        if values not in self.taken:
            name = f"{values.name}_taken"
            self.taken[values] = self._emit(bounded.take_branches, values, table.code, table.place, name=name)
        return self.taken[values]

    def _restart(self, node: fx.Node) -> None:
        cache, picked, change, values, _ = node.args
        table = self.tables[picked]  # type: ignore[index]  # a node
        self._replace(node, bounded.restart_branches, cache, change, self._taken(values), table.code, table.row)

    def _attend(self, node: fx.Node) -> None:
        query, key, value, row, scale = node.args
        assert isinstance(row, fx.Node)
        self._replace(node, bounded.attention_rows, query, key, value, row, self.rows[row].mask, scale)

    def _count(self, node: fx.Node) -> None:
        row = node.args[0]
        assert isinstance(row, fx.Node)
        self._replace(node, bounded.count_valid, self.rows[row].valid)

    def _count_branches(self, node: fx.Node) -> None:
        row, top_k = node.args
        self._replace(node, bounded.count_valid_branches, self.rows[row].valid, top_k)  # type: ignore[index]  # a node

    def _decide(self, node: fx.Node) -> None:
        node.kwargs = {"code_dtype": torch.int64}  # TensorRT follows lengths back to it, through int64 alone

    def _activation(self, node: fx.Node) -> None:
        node.target = bounded.update_activation


_RULES: dict[Any, Any] = {
    rows.select_rows: _Lowering._select,
    rows.rows_of_rows: _Lowering._rows_of_rows,
    rows.write_rows: _Lowering._write,
    dispatch.plan_recomputed: _Lowering._plan,
    dispatch.plan_branches: _Lowering._plan_all,
    dispatch.gather_branches: _Lowering._gather,
    dispatch.ungroup_branches: _Lowering._ungroup,
    dispatch.take_rows: _Lowering._take,
    dispatch.feature_norm: _Lowering._measure,
    attention_rows._opoverload: _Lowering._attend,
    slots.count_rows: _Lowering._count,
    slots.count_branches: _Lowering._count_branches,
    forecast.add_rows: _Lowering._add,
    forecast.forecast_rows: _Lowering._forecast,
    forecast.restart_rows: _Lowering._restart,
    torch.sub: _Lowering._subtract,
    branch.decide: _Lowering._decide,
    branch.decide_picked: _Lowering._decide,
    branch.update_activation: _Lowering._activation,
}


def _padded_experts(program: torch.nn.Module) -> fx.GraphModule:
    """An expert program over a padded table: ``(rows [E * C, H], row_expert [E * C], None) -> [E * C, H]``."""
    assert isinstance(program, fx.GraphModule), "experts are a graph"
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.graph, {}))
    padded = fx.GraphModule(program, graph)
    for node in padded.graph.find_nodes(op="call_function", target=grouped_linear._opoverload):
        node.target, node.args = bounded.grouped_linear, node.args[:3]
    padded.graph.lint()
    padded.recompile()
    padded.meta = copy.copy(program.meta)
    return padded


_OPEN = (
    rows.select_rows,
    rows.write_rows,
    forecast.add_rows,
    forecast.restart_rows,
    dispatch.plan_recomputed,
    dispatch.plan_branches,
    slots.count_rows,
    slots.count_branches,
)


def _check(module: fx.GraphModule, experts: Experts) -> None:
    """Nothing of open length may be left.

    Raises:
        ExportError: names the operation.
    """
    for part in module.modules():
        for node in part.graph.nodes if isinstance(part, fx.GraphModule) else ():
            unrolled = experts == "unrolled" and node.target is grouped_linear._opoverload
            if node.target in _OPEN or ("moeca" in str(getattr(node.target, "namespace", "")) and not unrolled):
                raise ExportError(
                    f"export: {node.name} ({node.target}) has a length that depends on data and no form for export; "
                    "please report this policy, or use moeca_fx.MoECa(...)"
                )
