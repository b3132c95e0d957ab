"""What each site does on a step of a branch rule, and which states that takes. Decided once, before any edit."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from moeca_fx.errors import UnsupportedModelError
from moeca_fx.graph.layout import STREAM, TokenAxes, propagate
from moeca_fx.graph.rewrite import example_value
from moeca_fx.graph.sites import AttentionSite, DenseFFNSite, MoESite, Site, Sites
from moeca_fx.graph.slicing import between
from moeca_fx.graph.state import StateSpec, with_older
from moeca_fx.policies.rules import BranchRule
from moeca_fx.policies.selector import ScoreThreshold
from moeca_fx.reasons import Reason

Action = Literal["full", "reuse", "rows", "synchronized"]


@dataclass(frozen=True)
class SitePlan:
    """`action` of a site on cached steps and the states it keeps.

    ``full`` computes everything and keeps nothing; ``reuse`` reads the cached output; ``rows`` recomputes the inherited
    tokens; ``synchronized`` (attention before its MoE site) recomputes the tokens that the provisional routing picks;
    a MoE site always has ``rows``: it recomputes by branch. `inherits` is the path of the MoE site whose refreshed
    tokens ``rows`` means: the nearest earlier one on the same token stream.
    """

    site: Site
    action: Action
    states: tuple[StateSpec, ...]
    inherits: str | None = None


def plan_sites(module: fx.GraphModule, sites: Sites, rule: BranchRule) -> tuple[SitePlan, ...]:
    """One plan a site, in network order."""
    nodes = {node.name: node for node in module.graph.nodes}
    plans = []
    streams: dict[str, str] = {}  # residual_out of each site -> where its stream begins
    last_moe: dict[str, MoESite] = {}  # beginning of a stream -> its nearest earlier MoE site
    by_path = {site.path: site for site in sites.attention}
    followed = {site.attention: site for site in sites.moe if site.attention}
    for site in sites.ordered:
        stream = streams[site.residual_out] = streams.get(site.residual_in, site.residual_in)
        source = last_moe.get(stream)
        inherited = source is not None and source.tokens == site.tokens
        if isinstance(site, AttentionSite):
            action = _attention_action(site, rule, followed.get(site.path), inherited)
            states = tuple(_attention_states(site, action, rule, nodes))
        elif isinstance(site, MoESite):
            check_layout(site, rule)
            action, last_moe[stream] = "rows", site
            assert site.attention is None or site.attention in by_path, f"{site.path}: unknown attention site"
            states = tuple(_moe_states(site, rule, nodes))
        else:
            action = _row_action(rule.dense_ffn, inherited)
            states = tuple(_ffn_states(site, action, rule, nodes))
        plans.append(SitePlan(site, action, states, source.path if source is not None and inherited else None))
    return tuple(plans)


def _attention_action(site: AttentionSite, rule: BranchRule, moe: MoESite | None, inherited: bool) -> Action:
    if rule.attention != "synchronized":
        return rule.attention
    if site.refused:
        return "full"
    if moe is not None:
        return "full" if moe.not_synchronized else "synchronized"
    return _row_action(rule.dense_ffn, inherited)


def _row_action(mode: str, inherited: bool) -> Action:
    if mode == "inherit":
        return "rows" if inherited else "reuse"
    return "full" if mode == "full" else "reuse"


def axes_of_rows(site: MoESite, nodes: dict[str, fx.Node]) -> TokenAxes:
    """Token axes of the rows that the experts read."""
    stream, x = nodes[site.residual_in], nodes[site.x]
    return propagate({stream: STREAM}, between([stream], [x]))[x]


def shared_axes(site: MoESite, nodes: dict[str, fx.Node]) -> tuple[TokenAxes, TokenAxes]:
    """Token axes of the shared expert's root and output."""
    assert site.shared and site.shared_root, f"{site.path} has no shared expert"
    stream, root, shared = nodes[site.residual_in], nodes[site.shared_root], nodes[site.shared]
    root_axes = STREAM if root is stream else propagate({stream: STREAM}, between([stream], [root]))[root]
    return root_axes, propagate({root: root_axes}, between([root], [shared]))[shared]


def _attention_states(
    site: AttentionSite, action: Action, rule: BranchRule, nodes: dict[str, fx.Node]
) -> Iterator[StateSpec]:
    if action == "full":
        return
    output = example_value(nodes[site.output])
    attn = StateSpec(site.path, "attn", _sample_shape(output), output.dtype, vector=True)
    yield from with_older(attn, rule.predictor.terms)
    if action != "reuse":
        for kind, name in (("key", site.key), ("value", site.value)):
            value = example_value(nodes[name])  # [B, h, T, d]
            heads, tokens, width = _sample_shape(value)
            yield StateSpec(site.path, kind, (tokens, heads, width), value.dtype, vector=True)


def _moe_states(site: MoESite, rule: BranchRule, nodes: dict[str, fx.Node]) -> Iterator[StateSpec]:
    slots, selector, terms = site.slots, rule.selector, rule.predictor.terms
    x, weight = example_value(nodes[site.x]), example_value(nodes[site.weight])
    score_dtype = torch.promote_types(weight.dtype, torch.float32)
    feature_dtype = x.dtype
    ranks_errors = needs_error(rule)
    # A full step that keeps older features matches its slots with those of the full step before.
    yield StateSpec(site.path, site.held, slots, torch.int64, carried=terms > 1)
    yield StateSpec(site.path, "weight", slots, score_dtype)
    if "score" in selector.signals:
        yield StateSpec(site.path, "norm", slots, torch.promote_types(feature_dtype, torch.float32))
    feature = StateSpec(site.path, "feature", (*slots, x.shape[-1]), feature_dtype, vector=True)
    yield from with_older(feature, terms, all_carried=ranks_errors)
    if ranks_errors:
        yield StateSpec(site.path, "error", slots, torch.float32)
    if isinstance(selector, ScoreThreshold):
        yield StateSpec(site.path, "activation", (site.num_experts, site.tokens), torch.float32, carried=True)
    if site.shared and rule.shared_expert != "full":
        shared = example_value(nodes[site.shared])
        kept = StateSpec(site.path, "shared", (site.tokens, shared.shape[-1]), shared.dtype, vector=True)
        yield from with_older(kept, terms)


def check_layout(site: MoESite, rule: BranchRule) -> None:
    """A rule must make sense for what the site's slots hold.

    Raises:
        UnsupportedModelError: a margin at a site with expert choice.
    """
    if site.layout == "expert" and rule.margin is not None:
        raise UnsupportedModelError(
            f"{site.path}: its experts choose their tokens, so a cached branch that stays for a new one would serve "
            f"the feature of another token; expected a rule without a margin, found {rule.margin}; set margin=None",
            code=Reason.POLICY,
        )


def needs_error(rule: BranchRule) -> bool:
    """Whether the selector ranks branches by what their forecast missed at the last full step."""
    return "error" in rule.selector.signals


def _ffn_states(site: DenseFFNSite, action: Action, rule: BranchRule, nodes: dict[str, fx.Node]) -> Iterator[StateSpec]:
    if action != "full":
        output = example_value(nodes[site.output])
        ffn = StateSpec(site.path, "ffn", _sample_shape(output), output.dtype, vector=True)
        yield from with_older(ffn, rule.predictor.terms)


def _sample_shape(value: torch.Tensor) -> tuple[int, ...]:
    return tuple(int(size) for size in value.shape[1:])
