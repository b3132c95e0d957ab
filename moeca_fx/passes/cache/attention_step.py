"""Attention on a cached step: reuse the cached output, or recompute the rows of selected tokens (section 4.1).

attn = proj(sdpa(q(x), k(x), v(x)))   -->   row   = select_rows(mask)
                                            q,k,v = project_rows(row, x, ...)
                                            key   = write_rows(cache_key, row, k);  value likewise
                                            out   = finish_rows(row, attention_rows(q, key, value))
                                                attn  = write_rows(cache_attn, row, out)
"""

from dataclasses import dataclass

from torch import fx

from moeca_fx.graph.layout import HEADS, STREAM
from moeca_fx.graph.row_program import RowProgram, build_row_program
from moeca_fx.graph.sites import AttentionSite
from moeca_fx.graph.state import SCALES_WITH, Counter
from moeca_fx.ops import rows, slots
from moeca_fx.ops.attention_rows import attention_rows
from moeca_fx.passes.cache.builder import StepBuilder
from moeca_fx.passes.cache.plan import SitePlan


@dataclass(frozen=True)
class AttentionPrograms:
    """Row programs of an attention site: stream -> query, key, value; attention result -> output."""

    project: RowProgram
    finish: RowProgram


def build_attention_programs(
    module: fx.GraphModule, nodes: dict[str, fx.Node], site: AttentionSite
) -> AttentionPrograms:
    """Build both programs from the unedited graph."""
    stream, core = nodes[site.residual_in], nodes[site.core]
    qkv = [nodes[name] for name in (site.query, site.key, site.value)]
    project = build_row_program(module, {stream: STREAM}, qkv, site.tokens)
    finish = build_row_program(module, {stream: STREAM}, [nodes[site.output]], site.tokens, given={core: HEADS})
    return AttentionPrograms(project, finish)


def rewrite_attention(
    step: StepBuilder, site: AttentionSite, plan: SitePlan, programs: AttentionPrograms | None
) -> None:
    """An attention site that is not synchronized with a MoE site."""
    if plan.action == "full":
        return
    state = f"{site.path}.attn"
    if programs is None:
        step.keep(state)
        output = step.reused(state)
    else:
        _, _, output = refresh_attention(step, site, tokens_to_refresh(step, plan, state), programs)
    step.replace(step.nodes[site.output], output)


def tokens_to_refresh(step: StepBuilder, plan: SitePlan, state: str) -> fx.Node:
    """The mask [B, T] of a site that recomputes rows: those of an earlier MoE site; without one all under `force`."""
    if plan.action == "reuse":
        return step.emit(slots.forced_tokens, step.cache[state], step.force, name=f"{state}_forced".replace(".", "_"))
    assert plan.inherits is not None, f"{plan.site.path}: rows without an earlier MoE site"
    return step.refreshed[plan.inherits]


def refresh_attention(
    step: StepBuilder, site: AttentionSite, mask: fx.Node, programs: AttentionPrograms
) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Recompute the rows of the tokens in `mask`: their row indices, the new output rows [M, H], the dense output."""
    base = site.path.replace(".", "_")
    core = step.nodes[site.core]
    by_row = Counter(site.path, "attention_rows")
    row = step.select(mask, f"{base}_row")
    names = tuple(f"{base}_{part}_rows" for part in ("query", "key", "value"))
    query, key, value = step.run_program(programs.project, row, f"{base}_project_rows", names, by_row)
    attended = step.emit(
        attention_rows._opoverload,
        query,
        _with_rows(step, site, "key", row, key),
        _with_rows(step, site, "value", row, value),
        row,
        _softmax_scale(core),
        name=f"{base}_attended",
    )
    attended.meta[SCALES_WITH] = Counter(site.path, "attention_padded")
    given = {core: attended}
    (output,) = step.run_program(programs.finish, row, f"{base}_finish_rows", (f"{base}_output_rows",), by_row, given)
    dense = step.refresh(f"{site.path}.attn", row, output)
    step.count(site.path, "attention_rows", slots.count_rows, row)
    step.count(site.path, "attention_padded", slots.count_padded, mask)
    return row, output, dense


def _with_rows(step: StepBuilder, site: AttentionSite, kind: str, row: fx.Node, fresh: fx.Node) -> fx.Node:
    """All keys or values [B, T, h, d]; where none are kept, rows are recomputed all together or not at all."""
    state = f"{site.path}.{kind}"
    if state in step.cache:
        return step.write(state, row, fresh)
    name = state.replace(".", "_")
    arguments = (step.cache[f"{site.path}.attn"], fresh)
    nothing = step.emit(rows.empty_rows, *arguments, name=f"no_{name}")
    return step.emit(rows.write_rows, nothing, row, fresh, name=f"all_{name}")


def _softmax_scale(core: fx.Node) -> float | None:
    scale = core.kwargs.get("scale")
    assert scale is None or isinstance(scale, float), f"{core.name}: a softmax scale is a number"
    return scale
