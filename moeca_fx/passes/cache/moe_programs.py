"""Row programs of a MoE site, and its shared expert on a cached step (method section 2, point 6).

shared = shared_expert(x)   -->   shared = write_rows(cache_shared, row, shared_rows(x[row]))      row: refreshed tokens
"""

from dataclasses import dataclass

from torch import fx

from moeca_fx.graph.layout import STREAM, TokenAxes
from moeca_fx.graph.row_program import RowProgram, build_row_program
from moeca_fx.graph.sites import AttentionSite, MoESite
from moeca_fx.graph.slicing import strip_reshapes
from moeca_fx.graph.state import Counter
from moeca_fx.ops import dispatch, rows, slots
from moeca_fx.passes.cache.builder import StepBuilder
from moeca_fx.passes.cache.plan import SitePlan, axes_of_rows, shared_axes
from moeca_fx.policies.rules import BranchRule


@dataclass(frozen=True)
class MoEPrograms:
    """Row programs of a MoE site: fresh attention rows -> routing and token rows; token rows -> shared expert."""

    routing: RowProgram | None
    shared: RowProgram | None
    x_axes: TokenAxes
    shared_axes: TokenAxes | None


def build_moe_programs(
    module: fx.GraphModule, nodes: dict[str, fx.Node], site: MoESite, plan: SitePlan, attention: SitePlan | None
) -> MoEPrograms:
    """Build the programs from the unedited graph."""
    x = strip_reshapes(nodes[site.x])
    routing = shared = shared_layout = None
    if attention is not None and attention.action == "synchronized":
        assert isinstance(attention.site, AttentionSite)
        start = nodes[attention.site.output]
        wanted = [strip_reshapes(nodes[site.expert]), strip_reshapes(nodes[site.weight]), x]
        routing = build_row_program(module, {}, wanted, site.tokens, given={start: STREAM})
    if any(state.kind == "shared" for state in plan.states):
        root_axes, shared_layout = shared_axes(site, nodes)
        output = nodes[site.shared or ""]
        shared = build_row_program(module, {}, [output], site.tokens, given={nodes[site.shared_root or ""]: root_axes})
    return MoEPrograms(routing, shared, axes_of_rows(site, nodes), shared_layout)


def run_shared(
    step: StepBuilder,
    site: MoESite,
    rule: BranchRule,
    x: fx.Node,
    mask: fx.Node,
    programs: MoEPrograms,
    rows_of_x: fx.Node | None = None,
) -> None:
    """Run the shared expert on some tokens, and reuse it elsewhere.

    Args:
        x: token rows that the experts read, of all tokens or of the rows `rows_of_x`.
        mask: which of them run, as many entries.
    """
    assert programs.shared is not None and programs.shared_axes is not None, f"{site.path} has no shared expert"
    base, state = site.path.replace(".", "_"), f"{site.path}.shared"
    if rule.shared_expert == "reuse" and step.force is None:
        step.keep(state)
        output = step.reused(state)
    else:
        chosen = step.emit(rows.select_rows, mask, name=f"{base}_shared_local")
        row = chosen
        if rows_of_x is not None:
            row = step.emit(rows.rows_of_rows, rows_of_x, chosen, name=f"{base}_shared_row")
        inputs = step.emit(dispatch.take_rows, x, chosen, name=f"{base}_shared_x")
        given = {step.nodes[site.shared_root or ""]: inputs}
        names, counter = (f"{base}_shared_output",), Counter(site.path, "shared_rows")
        (fresh,) = step.run_program(programs.shared, row, f"{base}_shared_rows", names, counter, given)
        output = step.refresh(state, row, fresh)
        step.count(site.path, "shared_rows", slots.count_rows, row)
    axes = programs.shared_axes
    dense = step.emit(rows.tokens_back, output, axes.batch, axes.token, name=f"{base}_shared")
    step.replace(step.nodes[site.shared or ""], dense)
