"""The branch level (MoECa): every site decides what to recompute, computes only that, and writes it into its cache.

    attn = proj(sdpa(q, k, v))                  attn = cached, rows of refreshed tokens recomputed   `attention_step`
    y    = experts(x) + shared(x)        -->    y    = cached features, picked branches recomputed   `moe_step`, or
                                                       where experts choose their tokens            `expert_choice_step`
    f    = mlp(x)                               f    = cached, rows of refreshed tokens recomputed   here

Row programs are built from the graph as the model wrote it, before the first edit.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import fx

from moeca_fx.discover import Layout
from moeca_fx.graph.layout import STREAM
from moeca_fx.graph.row_program import RowProgram, build_row_program
from moeca_fx.graph.sites import AttentionSite, DenseFFNSite, MoESite, Sites
from moeca_fx.graph.state import Counter
from moeca_fx.ops import slots
from moeca_fx.passes.cache.attention_step import (
    AttentionPrograms,
    build_attention_programs,
    rewrite_attention,
    tokens_to_refresh,
)
from moeca_fx.passes.cache.builder import StepBuilder
from moeca_fx.passes.cache.expert_choice_step import rewrite_chosen
from moeca_fx.passes.cache.full_step import store_branch_states
from moeca_fx.passes.cache.level import Level
from moeca_fx.passes.cache.moe_programs import MoEPrograms, build_moe_programs
from moeca_fx.passes.cache.moe_step import rewrite_moe
from moeca_fx.passes.cache.plan import SitePlan, needs_error, plan_sites
from moeca_fx.policies.rules import BranchRule

_REWRITES: dict[Layout, Callable[..., None]] = {"token": rewrite_moe, "expert": rewrite_chosen}


@dataclass
class _Programs:
    """Row programs by site path."""

    attention: dict[str, AttentionPrograms] = field(default_factory=dict)
    moe: dict[str, MoEPrograms] = field(default_factory=dict)
    dense: dict[str, RowProgram] = field(default_factory=dict)


class BranchLevel(Level):
    """A branch rule on one model."""

    def __init__(self, module: fx.GraphModule, sites: Sites, rule: BranchRule) -> None:
        self.rule = rule
        self.terms = rule.predictor.terms
        self.plans = plan_sites(module, sites, rule)
        self.states = tuple(state for plan in self.plans for state in plan.states)
        self.actions = tuple((plan.site.path, plan.action) for plan in self.plans)

    @property
    def store_reads_clock(self) -> bool:
        """To measure what the forecast of every branch missed."""
        return needs_error(self.rule)

    def store(self, step: StepBuilder) -> None:
        """See `full_step`."""
        store_branch_states(step, self.plans, self.rule)

    def rewrite(self, step: StepBuilder) -> None:
        """Rewrite every site in network order."""
        by_path = {plan.site.path: plan for plan in self.plans if isinstance(plan.site, AttentionSite)}
        programs = self._build_programs(step, by_path)
        for plan in self.plans:
            site = plan.site
            if isinstance(site, AttentionSite):
                if plan.action != "synchronized":  # its MoE site does that
                    rewrite_attention(step, site, plan, programs.attention.get(site.path))
            elif isinstance(site, MoESite):
                companion = by_path.get(site.attention or "")
                synchronized = None
                if companion is not None and companion.action == "synchronized":
                    assert isinstance(companion.site, AttentionSite)
                    synchronized = (companion.site, programs.attention[companion.site.path])
                _REWRITES[site.layout](step, site, programs.moe[site.path], self.rule, synchronized)
            else:
                _rewrite_dense_ffn(step, site, plan, programs.dense.get(site.path))

    def _build_programs(self, step: StepBuilder, by_path: dict[str, SitePlan]) -> _Programs:
        module, nodes, built = step.module, step.nodes, _Programs()
        for plan in self.plans:
            site = plan.site
            if isinstance(site, MoESite):
                companion = by_path.get(site.attention or "")
                built.moe[site.path] = build_moe_programs(module, nodes, site, plan, companion)
            elif plan.action in ("rows", "synchronized") or (plan.action == "reuse" and step.force is not None):
                if isinstance(site, AttentionSite):
                    built.attention[site.path] = build_attention_programs(module, nodes, site)
                else:
                    stream, output = nodes[site.residual_in], nodes[site.output]
                    built.dense[site.path] = build_row_program(module, {stream: STREAM}, [output], site.tokens)
        return built


def _rewrite_dense_ffn(step: StepBuilder, site: DenseFFNSite, plan: SitePlan, program: RowProgram | None) -> None:
    """A dense feed-forward reuses its output, or recomputes the tokens that the last MoE site refreshed."""
    if plan.action == "full":
        return
    state = f"{site.path}.ffn"
    if program is None:
        step.keep(state)
        output = step.reused(state)
    else:
        output = refresh_dense_ffn(step, site, state, tokens_to_refresh(step, plan, state), program)
    step.replace(step.nodes[site.output], output)


def refresh_dense_ffn(step: StepBuilder, site: DenseFFNSite, state: str, mask: fx.Node, program: RowProgram) -> fx.Node:
    """Compute the rows of the tokens in `mask` [B, T]; the dense output [B, T, H]."""
    base = site.path.replace(".", "_")
    row = step.select(mask, f"{base}_row")
    names, counter = (f"{base}_output_rows",), Counter(site.path, "ffn_rows")
    (fresh,) = step.run_program(program, row, f"{base}_rows", names, counter)
    output = step.refresh(state, row, fresh)
    step.count(site.path, "ffn_rows", slots.count_rows, row)
    return output
