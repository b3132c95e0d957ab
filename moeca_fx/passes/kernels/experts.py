"""Experts: all branches of a full step, or the recomputed ones of a cached step, one kernel each."""

import operator
from typing import Any

from torch import fx

from moeca_fx.graph.gated_form import GatedForm, gated_form
from moeca_fx.graph.rewrite import call
from moeca_fx.graph.state import SCALES_WITH
from moeca_fx.kernels.families import Family
from moeca_fx.ops import dispatch, rows, slots, storage
from moeca_fx.passes.kernels.edits import replace_call
from moeca_fx.passes.lower_inplace import may_write_in_place


def is_experts(node: fx.Node) -> bool:
    """Whether a node runs an expert program."""
    return node.op == "call_module" and len(node.args) == 3 and str(node.target).endswith("_experts")


def _weights(module: fx.GraphModule, node: fx.Node, family: Family) -> tuple[Any, ...] | str:
    """Operands of a kernel that stand for an expert program, inserted before it; or why there are none."""
    path = str(node.target)
    program = module.get_submodule(path)
    assert isinstance(program, fx.GraphModule)
    form = gated_form(program)
    if not isinstance(form, GatedForm):
        return form
    for name in (form.gate, form.up, form.down):
        if name is not None and not family.any_strides and 1 not in getattr(program, name).stride()[1:]:
            return f"the weight {name} is strided"
    with module.graph.inserting_before(node):
        operands = tuple(module.graph.get_attr(f"{path}.{name}") if name is not None else None for name in form.names())
    return (*operands, form.activation)


def _experts_before(node: fx.Node) -> fx.Node | None:
    source = node.args[0]
    return source if isinstance(source, fx.Node) and is_experts(source) else None


def lower_branches(module: fx.GraphModule, feature: fx.Node, family: Family) -> str | None:
    """All branches, in branch order; or their weighted sum, where nothing else reads them and a kernel has it."""
    hidden = _experts_before(feature)
    gathered = hidden.args[0] if hidden is not None else None
    if hidden is None or not isinstance(gathered, fx.Node) or gathered.target is not dispatch.gather_branches:
        return "the rows are not gathered from all tokens"
    if len(hidden.users) > 1:
        return "another node reads the grouped rows"
    plan = gathered.args[1].args[0]  # type: ignore[union-attr]  # gather_branches reads an item of a plan
    assert isinstance(plan, fx.Node) and plan.target is dispatch.plan_branches
    weights = _weights(module, hidden, family)
    if isinstance(weights, str):
        return weights
    x, expert = gathered.args[0], plan.args[0]
    readers = list(feature.users)
    if "mixture" not in family.missing and [reader.target for reader in readers] == [dispatch.combine_branches]:
        combined = readers[0]
        replace_call(module, combined, family.op("mixture"), x, expert, combined.args[1], *weights)
        return None
    with module.graph.inserting_before(feature):
        both = call(module.graph, family.op("branches"), x, expert, *weights, name=f"{hidden.name}_fused")
        made, norms = (
            call(module.graph, operator.getitem, both, index, name=f"{feature.name}_{kind}")
            for index, kind in enumerate(("fused", "norms"))
        )
    for kept in [user for user in readers if user.target is slots.slot_features]:
        for norm in [user for user in kept.users if user.target is dispatch.feature_norm]:
            replace_call(module, norm, slots.slots, norms, *kept.args[1:])
    feature.replace_all_uses_with(made)
    return None


def lower_recompute(module: fx.GraphModule, plan: fx.Node, family: Family) -> str | None:
    """The picked branches of a cached step, written where they are kept."""
    code, slot_expert, row, _ = plan.args
    taken = [user for item in plan.users for user in item.users if user.target is dispatch.take_rows]
    hidden = next((user for take in taken for user in take.users if is_experts(user)), None)
    if hidden is None:
        return "no experts read the plan"
    norms = [user for user in hidden.users if user.target is dispatch.feature_norm]
    others = [user for user in hidden.users if user not in norms]
    if family.takes_stored and [user.target for user in others] == [storage.narrow_rows]:  # the kernel narrows
        others = list(others[0].users)
    writes = [user for user in others if user.target is rows.write_rows]
    if len(writes) != 1 or writes != others:
        return "features are not only written into a cache: kept values are corrected"
    norm_writes = [user for norm in norms for user in norm.users]
    targets = [*writes, *norm_writes]
    if len(norm_writes) > 1 or any(not may_write_in_place(write) for write in targets):
        return "a cache is read after it is written"
    weights = _weights(module, hidden, family)
    if isinstance(weights, str):
        return weights
    (write,), x = writes, hidden.args[0].args[0]  # type: ignore[union-attr]  # the experts read rows that were taken
    caches = (write.args[0], norm_writes[0].args[0] if norm_writes else None)
    last = max(targets, key=list(module.graph.nodes).index)
    with module.graph.inserting_before(last):
        operands = (*caches, x, code, slot_expert, row, *weights)
        made = call(module.graph, family.recompute, *operands, name=f"{hidden.name}_recompute")
        made.meta[SCALES_WITH] = hidden.meta[SCALES_WITH]
        for index, written in enumerate(targets):
            item = call(module.graph, operator.getitem, made, index, name=f"{written.name}_done", like=written)
            written.replace_all_uses_with(item)
    return None


def lower_grouped(module: fx.GraphModule, hidden: fx.Node, family: Family) -> str | None:
    """An expert program on rows that something else gathered."""
    weights = _weights(module, hidden, family)
    if isinstance(weights, str):
        return weights
    x, _, ends = hidden.args
    replace_call(module, hidden, family.op("grouped"), x, ends, *weights)
    return None
