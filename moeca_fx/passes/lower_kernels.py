"""lower_kernels: replace reference functions by the CPU's fused kernels (`kernels/cpu`), where they apply.

    branch, .., offsets = plan_branches(expert)
    hidden   = experts(gather_branches(x, branch), ..)  -->  feature = moeca_cpu.branches(x, expert, W..)
    feature  = ungroup_branches(hidden, branch)

    y        = combine_branches(feature, w, x)          -->  y = moeca_cpu.mixture(x, expert, w, W..)    no cache reads it

    picked, local, .. = plan_recomputed(code, expert, row)
    hidden   = experts(take_rows(x, local), ..)         -->  feature, norm = recompute_branches(cache_feature,
    norm     = write_rows(cache_norm, picked, |hidden|)                          cache_norm, x, code, expert, row, W..)
    feature  = write_rows(cache_feature, picked, hidden)

Decisions, thresholds, the router's top-k and row attention likewise, one call each. A kernel takes fp32 and bf16, and
experts of the form in `graph/gated_form.py`; what it does not take stays as it is, and the result says why.
"""

import logging
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from moeca_fx.graph.gated_form import GatedForm, gated_form
from moeca_fx.graph.rewrite import call, copy_meta, example_value, sort_stably
from moeca_fx.graph.slicing import ancestors
from moeca_fx.graph.state import SCALES_WITH, Counter
from moeca_fx.kernels.cpu import ops as kernels
from moeca_fx.ops import dispatch, rows
from moeca_fx.ops.attention_rows import attention_rows
from moeca_fx.policies import branch

log = logging.getLogger(__name__)
aten = torch.ops.aten


@dataclass
class Lowered:
    """What the pass did to one graph.

    Attributes:
        count: rewritten calls by kernel.
        left: reasons why something stayed as it was, in order, each once.
    """

    count: dict[str, int] = field(default_factory=dict)
    left: dict[str, None] = field(default_factory=dict)


def lower_kernels(module: fx.GraphModule) -> Lowered:
    """Lower every call that a kernel takes, in place."""
    result = Lowered()
    problem = _why_not(module)
    if problem is not None:
        result.left[problem] = None
        return result
    rules: tuple[tuple[str, Any, Callable[[fx.GraphModule, fx.Node], str | None]], ...] = (
        ("branches", dispatch.ungroup_branches, _lower_branches),
        ("recompute", dispatch.plan_recomputed, _lower_recompute),
        ("threshold", branch.expert_threshold, _lower_threshold),
        ("update_activation", branch.update_activation, _lower_activation),
        ("decide", branch.decide, _lower_decide),
        ("decide_picked", branch.decide_picked, _lower_decide_picked),
        ("top_k", aten.topk.default, _lower_top_k),
        ("attention_rows", attention_rows._opoverload, _lower_attention),
    )
    for name, target, rule in rules:
        for node in [node for node in module.graph.nodes if node.target is target]:
            _note(result, name, rule(module, node))
    for node in [node for node in module.graph.nodes if _is_experts(node)]:
        _note(result, "grouped", _lower_grouped(module, node))
    _drop_dead(module)
    sort_stably(module.graph)
    module.graph.lint()
    module.recompile()
    return result


def _note(result: Lowered, name: str, reason: str | None) -> None:
    if reason is None:
        result.count[name] = result.count.get(name, 0) + 1
    else:
        result.left[f"{name}: {reason}"] = None


def _why_not(module: fx.GraphModule) -> str | None:
    """What keeps every kernel from this graph."""
    tensors = [*module.parameters(), *module.buffers()]
    places = {tensor.device.type for tensor in tensors}
    if places - {"cpu"}:
        return f"the weights are on {', '.join(sorted(places))}; CPU kernels take the CPU"
    odd = {tensor.dtype for tensor in tensors if tensor.is_floating_point()} - set(kernels.DTYPES)
    if odd:
        return f"there is no CPU kernel for {', '.join(sorted(map(str, odd)))}"
    return None if kernels.available() else "the CPU kernels are not built"


# -- experts ----------------------------------------------------------------------------------------------------


def _is_experts(node: fx.Node) -> bool:
    return node.op == "call_module" and len(node.args) == 3 and str(node.target).endswith("_experts")


def _weights(module: fx.GraphModule, node: fx.Node) -> tuple[Any, ...] | str:
    """Operands of a kernel that stand for an expert program, inserted before it; or why there are none."""
    path = str(node.target)
    program = module.get_submodule(path)
    assert isinstance(program, fx.GraphModule)
    form = gated_form(program)
    if not isinstance(form, GatedForm):
        return form
    for name in (form.gate, form.up, form.down):
        if name is not None and 1 not in getattr(program, name).stride()[1:]:
            return f"the weight {name} is strided"
    with module.graph.inserting_before(node):
        operands = tuple(
            module.graph.get_attr(f"{path}.{name}") if name is not None else None for name in form.names()
        )
    return (*operands, form.activation)


def _experts_before(node: fx.Node) -> fx.Node | None:
    source = node.args[0]
    return source if isinstance(source, fx.Node) and _is_experts(source) else None


def _lower_branches(module: fx.GraphModule, feature: fx.Node) -> str | None:
    hidden = _experts_before(feature)
    gathered = hidden.args[0] if hidden is not None else None
    if hidden is None or not isinstance(gathered, fx.Node) or gathered.target is not dispatch.gather_branches:
        return "the rows are not gathered from all tokens"
    if len(hidden.users) > 1:
        return "another node reads the grouped rows"
    plan = gathered.args[1].args[0]  # type: ignore[union-attr]  # gather_branches reads an item of a plan
    assert isinstance(plan, fx.Node) and plan.target is dispatch.plan_branches
    weights = _weights(module, hidden)
    if isinstance(weights, str):
        return weights
    x, expert = gathered.args[0], plan.args[0]
    readers = list(feature.users)
    if [reader.target for reader in readers] == [dispatch.combine_branches]:
        combined = readers[0]
        _replace(module, combined, torch.ops.moeca_cpu.mixture.default, x, expert, combined.args[1], *weights)
    else:
        _replace(module, feature, torch.ops.moeca_cpu.branches.default, x, expert, *weights)
    return None


def _lower_recompute(module: fx.GraphModule, plan: fx.Node) -> str | None:
    code, slot_expert, row, _ = plan.args
    taken = [user for item in plan.users for user in item.users if user.target is dispatch.take_rows]
    hidden = next((user for take in taken for user in take.users if _is_experts(user)), None)
    if hidden is None:
        return "no experts read the plan"
    writes = [user for user in hidden.users if user.target is rows.write_rows]
    norms = [user for user in hidden.users if user.target is dispatch.feature_norm]
    if len(writes) != 1 or len(writes) + len(norms) != len(hidden.users):
        return "features are not only written into a cache: kept values are corrected"
    norm_writes = [user for norm in norms for user in norm.users]
    targets = [*writes, *norm_writes]
    if len(norm_writes) > 1 or any(not _may_write_in_place(write) for write in targets):
        return "a cache is read after it is written"
    weights = _weights(module, hidden)
    if isinstance(weights, str):
        return weights
    (write,), x = writes, taken[0].args[0]
    caches = (write.args[0], norm_writes[0].args[0] if norm_writes else None)
    last = max(targets, key=list(module.graph.nodes).index)
    with module.graph.inserting_before(last):
        operands = (*caches, x, code, slot_expert, row, *weights)
        made = call(module.graph, kernels.recompute_branches, *operands, name=f"{hidden.name}_recompute")
        made.meta[SCALES_WITH] = hidden.meta[SCALES_WITH]
        for index, written in enumerate(targets):
            item = call(module.graph, operator.getitem, made, index, name=f"{written.name}_done", like=written)
            written.replace_all_uses_with(item)
    return None


def _lower_grouped(module: fx.GraphModule, hidden: fx.Node) -> str | None:
    weights = _weights(module, hidden)
    if isinstance(weights, str):
        return weights
    x, _, ends = hidden.args
    _replace(module, hidden, torch.ops.moeca_cpu.grouped.default, x, ends, *weights)
    return None


def _may_write_in_place(write: fx.Node) -> bool:
    """Whether all that reads the cache's old value runs before the write."""
    cache = write.args[0]
    if not isinstance(cache, fx.Node) or cache.op != "placeholder":
        return False
    before = ancestors([write])
    return all(user is write or user in before for user in cache.users)


# -- decisions --------------------------------------------------------------------------------------------------


def _lower_threshold(module: fx.GraphModule, node: fx.Node) -> str | None:
    activation, tau0, alpha, norm = node.args
    if not isinstance(activation, fx.Node) or activation.target is not branch.update_activation:
        return "the activation is not updated before it"
    before, expert, beta = activation.args
    arguments = (before, expert, beta, tau0, alpha, norm == "log", branch.ALIKE_ENTROPIES)
    _replace(module, node, torch.ops.moeca_cpu.threshold.default, *arguments)
    return None


def _lower_activation(module: fx.GraphModule, node: fx.Node) -> str | None:
    if not node.users:
        return None  # read by a threshold only, which is lowered already
    if not _may_write_in_place(node):
        return "the activation is read after it is updated"
    _replace(module, node, kernels.update_activation_, *node.args)
    return None


def _lower_decide(module: fx.GraphModule, node: fx.Node) -> str | None:
    *operands, threshold, lambda1, lambda2, kind = node.args
    arguments = (*operands, threshold, None, lambda1, lambda2, kind == "share", None)
    _replace(module, node, torch.ops.moeca_cpu.decide.default, *arguments)
    return None


def _lower_decide_picked(module: fx.GraphModule, node: fx.Node) -> str | None:
    expert, weight, cached_expert, cached_weight, picked, kind, margin = node.args
    arguments = (expert, weight, cached_expert, cached_weight, None, None, picked, 0.0, 0.0, kind == "share", margin)
    _replace(module, node, torch.ops.moeca_cpu.decide.default, *arguments)
    return None


def _lower_top_k(module: fx.GraphModule, node: fx.Node) -> str | None:
    x, k, *rest = node.args
    value = example_value(x) if isinstance(x, fx.Node) else None
    dim, largest, *_ = [*rest, *(-1, True)[len(rest) :]]
    if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
        return "the values are not fp32"
    if dim not in (-1, value.dim() - 1) or not largest or node.kwargs or not isinstance(k, int):
        return "it is not the largest k along the last axis"
    if k > kernels.MOST_SLOTS:
        return f"k is above {kernels.MOST_SLOTS}"
    _replace(module, node, torch.ops.moeca_cpu.top_k.default, x, k)
    return None


def _lower_attention(module: fx.GraphModule, node: fx.Node) -> str | None:
    counter = node.meta.get(SCALES_WITH)
    made = _replace(module, node, torch.ops.moeca_cpu.attention_rows.default, *node.args)
    if counter is not None:  # the kernel pads nothing
        made.meta[SCALES_WITH] = Counter(counter.site, "attention_rows")
    return None


# -- edits ------------------------------------------------------------------------------------------------------


def _replace(module: fx.GraphModule, node: fx.Node, target: Any, *args: Any) -> fx.Node:
    with module.graph.inserting_before(node):
        made = call(module.graph, target, *args, name=f"{node.name}_fused", like=node)
    copy_meta(node, made)
    if SCALES_WITH in node.meta:
        made.meta[SCALES_WITH] = node.meta[SCALES_WITH]
    node.replace_all_uses_with(made)
    module.graph.erase_node(node)
    return made


def _drop_dead(module: fx.GraphModule) -> None:
    """Remove what only led to lowered calls; kernels that write into caches stay, for their results are read."""
    for node in reversed(list(module.graph.nodes)):
        if node.op not in ("placeholder", "output") and not node.users:
            module.graph.erase_node(node)
