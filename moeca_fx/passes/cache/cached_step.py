"""A cached step: every site decides what to recompute, computes only that, and writes it into its cache.

    attn = proj(sdpa(q, k, v))                  attn = cached, rows of refreshed tokens recomputed   `attention_step`
    y    = experts(x) + shared(x)        -->    y    = cached features, picked branches recomputed   `moe_step`
    f    = mlp(x)                               f    = cached, rows of refreshed tokens recomputed   here

Row programs are built from the graph as the model wrote it, before the first edit.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx

from moeca_fx.graph.layout import STREAM
from moeca_fx.graph.row_program import RowProgram, build_row_program
from moeca_fx.graph.sites import AttentionSite, DenseFFNSite, MoESite
from moeca_fx.graph.state import Counter
from moeca_fx.ops import rows, slots
from moeca_fx.passes.cache.attention_step import AttentionPrograms, build_attention_programs, rewrite_attention
from moeca_fx.passes.cache.builder import StepBuilder
from moeca_fx.passes.cache.moe_step import MoEPrograms, build_moe_programs, rewrite_moe
from moeca_fx.passes.cache.plan import SitePlan
from moeca_fx.policies import MoECa


@dataclass
class _Programs:
    """Row programs by site path."""

    attention: dict[str, AttentionPrograms] = field(default_factory=dict)
    moe: dict[str, MoEPrograms] = field(default_factory=dict)
    dense: dict[str, RowProgram] = field(default_factory=dict)


def insert_cached_step(
    module: fx.GraphModule, plans: Sequence[SitePlan], policy: MoECa, cache: dict[str, fx.Node]
) -> StepBuilder:
    """Rewrite every site of a vectorised graph, in place and in network order.

    Args:
        cache: graph input of every state, by state name.

    Returns:
        The builder, which holds the updated states and the counters.
    """
    step = StepBuilder(module, policy, cache, {node.name: node for node in module.graph.nodes})
    by_path = {plan.site.path: plan for plan in plans if isinstance(plan.site, AttentionSite)}
    programs = _build_programs(step, plans, by_path)
    with module.graph.inserting_before(module.graph.output_node()):
        for plan in plans:
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
                rewrite_moe(step, site, programs.moe[site.path], synchronized)
            else:
                _rewrite_dense_ffn(step, site, plan, programs.dense.get(site.path))
    return step


def _build_programs(step: StepBuilder, plans: Sequence[SitePlan], by_path: dict[str, SitePlan]) -> _Programs:
    module, nodes, built = step.module, step.nodes, _Programs()
    for plan in plans:
        site = plan.site
        if isinstance(site, MoESite):
            companion = by_path.get(site.attention or "")
            built.moe[site.path] = build_moe_programs(module, nodes, site, plan, companion)
        elif plan.action in ("rows", "synchronized"):
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
    base, state = site.path.replace(".", "_"), f"{site.path}.ffn"
    if plan.action == "reuse":
        step.updated[state] = step.cache[state]
    else:
        assert plan.inherits is not None and program is not None, f"{site.path}: rows without an earlier MoE site"
        row = step.emit(rows.select_rows, step.refreshed[plan.inherits], name=f"{base}_row")
        names, counter = (f"{base}_output_rows",), Counter(site.path, "ffn_rows")
        (fresh,) = step.run_program(program, row, f"{base}_rows", names, counter)
        step.write(state, row, fresh)
        step.count(site.path, "ffn_rows", slots.count_rows, row)
    step.nodes[site.output].replace_all_uses_with(step.updated[state])
