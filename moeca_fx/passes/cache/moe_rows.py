"""A whole MoE layer on a few token rows: route them, run their experts, finish as the model does.

row                    = select_rows(mask)
expert, weight, x_rows = routing_rows(row, x)                      the model's own router
combined               = combine_rows(experts(x_rows), weight)
y_rows                 = finish_rows(row, combined, x)             shared expert, sums, all before the gate
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from moeca_fx.graph.layout import STREAM
from moeca_fx.graph.row_program import RowProgram, build_row_program
from moeca_fx.graph.sites import Form, MoESite
from moeca_fx.graph.slicing import strip_reshapes
from moeca_fx.graph.state import SCALES_WITH, Counter
from moeca_fx.ops import dispatch, present, slots
from moeca_fx.passes.cache.builder import StepBuilder
from moeca_fx.passes.cache.plan import axes_of_rows


@dataclass(frozen=True)
class MoERowPrograms:
    """Token stream -> expert ids, weights, token rows; combined experts and token stream -> output before the gate."""

    routing: RowProgram
    finish: RowProgram


def build_moe_row_programs(module: fx.GraphModule, nodes: dict[str, fx.Node], site: MoESite) -> MoERowPrograms:
    """Build both programs from the unedited graph."""
    stream, combined = nodes[site.residual_in], nodes[site.experts]
    wanted = [strip_reshapes(nodes[name]) for name in (site.expert, site.weight, site.x)]
    routing = build_row_program(module, {stream: STREAM}, wanted, site.tokens)
    given = {combined: axes_of_rows(site, nodes)}
    if nodes[site.output] is combined:
        raise AssertionError(f"{site.path}: the output is laid out [B, T, H] by a view of the experts' rows")
    finish = build_row_program(module, {stream: STREAM}, [nodes[site.output]], site.tokens, given=given)
    return MoERowPrograms(routing, finish)


def refresh_moe(step: StepBuilder, site: MoESite, state: str, mask: fx.Node, programs: MoERowPrograms) -> fx.Node:
    """Compute the rows of the tokens in `mask` [B, T]; the dense output [B, T, H]."""
    base, counter = site.path.replace(".", "_"), Counter(site.path, "moe_rows")
    row = step.select(mask, f"{base}_row")
    names = tuple(f"{base}_{part}_rows" for part in ("expert", "weight", "x"))
    expert, weight, x = step.run_program(programs.routing, row, f"{base}_routing_rows", names, counter)
    feature = _FEATURES[site.form](step, site, expert, x)
    combined = step.emit(dispatch.combine_rows, feature, weight, site.top_k, name=f"{base}_rows_combined")
    combined.meta[SCALES_WITH] = counter
    given = {step.nodes[site.experts]: combined}
    (fresh,) = step.run_program(programs.finish, row, f"{base}_finish_rows", (f"{base}_fresh",), counter, given)
    output = step.refresh(state, row, fresh)
    step.count(site.path, "moe_rows", slots.count_rows, row)
    step.count(site.path, "shared_rows", slots.count_rows, row)
    if site.empty_slots:
        step.count(site.path, "recomputed", present.count_present, expert, site.num_experts)
    else:
        step.count(site.path, "recomputed", slots.count_branches, row, site.top_k)
    return output


def _features(step: StepBuilder, site: MoESite, expert: fx.Node, x: fx.Node) -> fx.Node:
    """Every branch of some rows: expert [M, k], x [M, H] -> [M*k, H]."""
    base = site.path.replace(".", "_")
    plan = step.emit(dispatch.plan_branches, expert, site.num_experts, name=f"{base}_rows_plan")
    branch, row_expert, offsets = step.unpack(
        plan, *(f"{base}_rows_{part}" for part in ("branch", "row_expert", "offsets"))
    )
    inputs = step.emit(dispatch.gather_branches, x, branch, site.top_k, name=f"{base}_rows_inputs")
    hidden = _hidden(step, base, inputs, row_expert, offsets)
    hidden.meta[SCALES_WITH] = Counter(site.path, "moe_rows")
    return step.emit(dispatch.ungroup_branches, hidden, branch, name=f"{base}_rows_feature")


def _present_features(step: StepBuilder, site: MoESite, expert: fx.Node, x: fx.Node) -> fx.Node:
    """`_features` where slots may be empty: zero there."""
    base = site.path.replace(".", "_")
    code = step.emit(present.present_code, expert, site.num_experts, site.top_k, name=f"{base}_rows_present")
    plan = step.emit(dispatch.plan_recomputed, code, expert, None, site.num_experts, name=f"{base}_rows_plan")
    branch, local, row_expert, offsets = step.unpack(
        plan, *(f"{base}_rows_{part}" for part in ("branch", "local", "row_expert", "offsets"))
    )
    inputs = step.emit(dispatch.take_rows, x, local, name=f"{base}_rows_inputs")
    hidden = _hidden(step, base, inputs, row_expert, offsets)
    hidden.meta[SCALES_WITH] = Counter(site.path, "recomputed")
    return step.emit(present.spread, hidden, branch, code, name=f"{base}_rows_feature")


def _hidden(step: StepBuilder, base: str, inputs: fx.Node, row_expert: fx.Node, offsets: fx.Node) -> fx.Node:
    operands = (inputs, row_expert, offsets)
    return step.graph.create_node("call_module", f"{base}_experts", operands, name=f"{base}_rows_hidden")


_FEATURES: dict[Form, Callable[[StepBuilder, MoESite, fx.Node, fx.Node], fx.Node]] = {
    "token": _features,
    "empty": _present_features,
}
