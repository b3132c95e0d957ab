"""Decisions: match and score, thresholds, the router's top-k."""

import torch
from torch import fx

from moeca_fx.graph.rewrite import example_value
from moeca_fx.kernels.cpu import ops as cpu
from moeca_fx.kernels.families import Family
from moeca_fx.passes.kernels.edits import replace_call
from moeca_fx.passes.lower_inplace import may_write_in_place
from moeca_fx.policies import branch


def lower_threshold(module: fx.GraphModule, node: fx.Node, family: Family) -> str | None:
    """Thresholds from the activation after this routing, which is not stored in between."""
    activation, tau0, alpha, norm = node.args
    if not isinstance(activation, fx.Node) or activation.target is not branch.update_activation:
        return "the activation is not updated before it"
    before, expert, beta = activation.args
    arguments = (before, expert, beta, tau0, alpha, norm == "log", branch.ALIKE_ENTROPIES)
    replace_call(module, node, family.op("threshold"), *arguments)
    return None


def lower_activation(module: fx.GraphModule, node: fx.Node, family: Family) -> str | None:
    """The kept activation, updated in place."""
    if not may_write_in_place(node):
        return "the activation is read after it is updated"
    replace_call(module, node, cpu.update_activation_, *node.args)
    return None


def lower_decide(module: fx.GraphModule, node: fx.Node, family: Family) -> str | None:
    """A decision by score."""
    *operands, threshold, lambda1, lambda2, kind = node.args
    arguments = (*operands, threshold, None, lambda1, lambda2, kind == "share", None)
    replace_call(module, node, family.op("decide"), *arguments)
    return None


def lower_decide_picked(module: fx.GraphModule, node: fx.Node, family: Family) -> str | None:
    """A decision whose matched branches were picked before."""
    expert, weight, cached_expert, cached_weight, picked, kind, margin = node.args
    arguments = (expert, weight, cached_expert, cached_weight, None, None, picked, 0.0, 0.0, kind == "share", margin)
    replace_call(module, node, family.op("decide"), *arguments)
    return None


def lower_top_k(module: fx.GraphModule, node: fx.Node, family: Family) -> str | None:
    """The router's choice."""
    x, k, *rest = node.args
    value = example_value(x) if isinstance(x, fx.Node) else None
    dim, largest = ([*rest, *(-1, True)[len(rest) :]])[:2]
    if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
        return "the values are not fp32"
    if dim not in (-1, value.dim() - 1) or not largest or node.kwargs or not isinstance(k, int):
        return "it is not the largest k along the last axis"
    if k > cpu.MOST_SLOTS:
        return f"k is above {cpu.MOST_SLOTS}"
    replace_call(module, node, family.op("top_k"), x, k)
    return None
