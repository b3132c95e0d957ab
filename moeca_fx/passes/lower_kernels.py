"""lower_kernels: replace reference functions by the fused kernels of the device that holds the weights.

    branch, .., offsets = plan_branches(expert)
    hidden   = experts(gather_branches(x, branch), ..)  -->  feature = moeca_cpu.branches(x, expert, W..)
    feature  = ungroup_branches(hidden, branch)

    y        = combine_branches(feature, w, x)          -->  y = moeca_cpu.mixture(x, expert, w, W..)
                                                             where nothing else reads the features

    picked, local, .. = plan_recomputed(code, expert, row)
    hidden   = experts(take_rows(x, local), ..)         -->  feature, norm = recompute_branches(cache_feature,
    norm     = write_rows(cache_norm, picked, |hidden|)                          cache_norm, x, code, expert, row, W..)
    feature  = write_rows(cache_feature, picked, hidden)

On a CPU (`kernels/cpu`, fp32 and bf16) decisions, thresholds, the router's top-k, adaLN and row attention likewise, one
call each, and attention of all tokens where it is measured to be faster than torch's (`ops/cpu_attention`). Kernels
take experts of the form in `graph/gated_form.py`; what they do not take stays, and the result says why.

There a cache in bf16 beside a model in fp32 is read and written where it lies: by `recompute`, by row attention (keys
and values) and by a gated norm (what it adds).

On a GPU (`kernels/triton_gpu`, also fp16) there are `branches`, `recompute`, `grouped`, `decide` by score and
`attention_rows`; Inductor does the rest. The weighted sum then follows `moeca_gpu.branches` as it is, for Inductor
fuses it with the residual: eight launches for any number of experts and no wait, where the reference waits for the
group sizes and launches three products an expert.
"""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from moeca_fx.graph.rewrite import programs_of, sort_stably
from moeca_fx.kernels.families import CPU, FAMILIES, Family
from moeca_fx.ops import dispatch
from moeca_fx.ops.attention_rows import attention_rows
from moeca_fx.passes.kernels.attention import lower_attention, lower_attention_rows
from moeca_fx.passes.kernels.decisions import (
    lower_activation,
    lower_decide,
    lower_decide_picked,
    lower_threshold,
    lower_top_k,
)
from moeca_fx.passes.kernels.experts import is_experts, lower_branches, lower_grouped, lower_recompute
from moeca_fx.passes.kernels.norms import lower_norm
from moeca_fx.policies import branch

log = logging.getLogger("moeca_fx.kernels")
aten = torch.ops.aten

Rule = Callable[[fx.GraphModule, fx.Node, Family], str | None]
"""Lowers one call, or says why it stays."""


@dataclass
class Lowered:
    """What the pass did to one graph.

    Attributes:
        count: rewritten calls by kernel.
        left: reasons why something stayed as it was, in order, each once.
    """

    count: dict[str, int] = field(default_factory=dict)
    left: dict[str, None] = field(default_factory=dict)


def lower_kernels(module: fx.GraphModule, family: Family | None = None) -> Lowered:
    """Lower every call that a kernel takes, in place.

    Args:
        family: the kernels to use; by the device of the weights when None.
    """
    result = Lowered()
    found = family or _family(module)
    problem = found if isinstance(found, str) else _wrong_dtype(module, found)
    if problem is not None:
        result.left[problem] = None
        _say_once(problem)
        return result
    assert isinstance(found, Family)
    if not found.available():  # which said why
        result.left[found.unavailable] = None
        return result
    top_k = ("top_k", aten.topk.default, lower_top_k)
    rules: tuple[tuple[str, Any, Rule], ...] = (
        ("branches", dispatch.ungroup_branches, lower_branches),
        ("recompute", dispatch.plan_recomputed, lower_recompute),
        ("threshold", branch.expert_threshold, lower_threshold),
        ("update_activation", branch.update_activation, lower_activation),
        ("decide", branch.decide, lower_decide),
        ("decide_picked", branch.decide_picked, lower_decide_picked),
        top_k,
        ("norm", aten.layer_norm.default, lower_norm),
        ("attention", aten.scaled_dot_product_attention.default, lower_attention),
        ("attention_rows", attention_rows._opoverload, lower_attention_rows),
    )
    for name, target, rule in rules:
        _apply(module, result, found, name, target, rule)
    for program in programs_of(module):
        _apply(program, result, found, *top_k)  # routes the refreshed rows again
        program.recompile()
    for node in [node for node in module.graph.nodes if is_experts(node)]:
        _note(result, "grouped", lower_grouped(module, node, found))
    _drop_dead(module)
    sort_stably(module.graph)
    module.graph.lint()
    module.recompile()
    return result


def _apply(module: fx.GraphModule, result: Lowered, family: Family, name: str, target: Any, rule: Rule) -> None:
    """Lower every call of one function by one rule."""
    for node in [node for node in module.graph.nodes if node.target is target]:
        _note(result, name, family.missing[name] if name in family.missing else rule(module, node, family))
    _drop_dead(module)  # a lowered call no longer reads what it read


@functools.cache
def _say_once(problem: str) -> None:
    """Tell, once a process, why the reference operations run."""
    log.warning("%s; slower reference operations run instead", problem)


def _note(result: Lowered, name: str, reason: str | None) -> None:
    if reason is None:
        result.count[name] = result.count.get(name, 0) + 1
    else:
        result.left[f"{name}: {reason}"] = None


def _family(module: fx.GraphModule) -> Family | str:
    """The kernels for the device of a graph's weights, or why there are none."""
    places = {tensor.device.type for tensor in (*module.parameters(), *module.buffers())} or {CPU.device}
    found = next((family for family in FAMILIES if places == {family.device}), None)
    return found or f"the weights are on {', '.join(sorted(places))}; kernels take one of a CPU and a CUDA GPU"


def _wrong_dtype(module: fx.GraphModule, family: Family) -> str | None:
    """What keeps every kernel of a family from this graph."""
    tensors = [*module.parameters(), *module.buffers()]
    odd = {tensor.dtype for tensor in tensors if tensor.is_floating_point()} - set(family.dtypes)
    return f"there is no {family.name} kernel for {', '.join(sorted(map(str, odd)))}" if odd else None


def _drop_dead(module: fx.GraphModule) -> None:
    """Remove what only led to lowered calls; kernels that write into caches stay, for their results are read."""
    for node in reversed(list(module.graph.nodes)):
        if node.op not in ("placeholder", "output") and not node.users:
            module.graph.erase_node(node)
