"""vectorize_experts: one grouped program for each marker, equal to the loop, over shared storage."""

import torch
from torch import fx

from moeca_fx.graph.expert_stack import stack_in_place
from moeca_fx.graph.sites import MoESite, Sites
from moeca_fx.ops import dispatch
from moeca_fx.ops.grouped_linear import grouped_linear
from moeca_fx.passes.vectorize_experts import vectorize_experts
from tests.helpers import zoo_models
from tests.helpers.passes import Stage, check_pass, staged
from tests.helpers.toys import toy, toy_inputs

marker = torch.ops.moeca.experts.default
linear = torch.ops.aten.linear.default
DISPATCH = (
    dispatch.plan_branches,
    dispatch.gather_branches,
    dispatch.ungroup_branches,
    dispatch.combine_branches,
)


def _stack(stage: Stage) -> None:
    for region in stage.captured.regions.values():
        stack_in_place([stage.model.get_submodule(path) for path in region.experts])


class _Vectorize:
    """The pass on a copy; a second run starts from the sites of the first."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.sites = stage, stage.sites

    def __call__(self, module: fx.GraphModule) -> Sites:
        stage = self.stage
        self.sites = vectorize_experts(module, self.sites, stage.captured.regions, stage.model)
        return self.sites


def test_two_markers_become_two_programs() -> None:
    stage = staged(toy(height=2), toy_inputs())
    _stack(stage)
    run = _Vectorize(stage)
    with torch.no_grad(), stage.live():
        examples = [toy_inputs(seed=1), toy_inputs(1, seed=2), toy_inputs(5, seed=3)]
        ops = {marker: (2, 0), **dict.fromkeys(DISPATCH, (0, 2))}
        after = check_pass(stage.normalized, run, examples, ops, tolerance=1e-6)
    programs = [after.get_submodule(str(node.target)) for node in after.graph.nodes if node.op == "call_module"]
    assert len(programs) == 2
    for program in programs:
        assert isinstance(program, fx.GraphModule)
        calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
        assert calls.count(grouped_linear._opoverload) == 3 and linear not in calls
    names = {node.name for node in after.graph.nodes}
    for site in run.sites.moe:
        assert site.feature in names and site.experts in names
    before = [site for site in stage.sites.ordered if not isinstance(site, MoESite)]
    assert [site for site in run.sites.ordered if not isinstance(site, MoESite)] == before


def test_experts_in_slices() -> None:
    stage = staged(zoo_models.tiny_ditmoe(), zoo_models.inputs())
    _stack(stage)
    with torch.no_grad(), stage.live():
        examples = [zoo_models.inputs(2, seed=1, t=0.4), zoo_models.inputs(5, seed=2)]
        after = check_pass(stage.normalized, _Vectorize(stage), examples, {marker: (2, 0)}, tolerance=1e-5)
    program = after.get_submodule("blocks_0_moe_experts")
    assert isinstance(program, fx.GraphModule)
    calls = [node.target for node in program.graph.nodes]
    assert calls.count(grouped_linear._opoverload) == 3  # the two slices of each matrix are joined


def test_no_second_copy_of_the_weights() -> None:
    stage = staged(toy(height=2), toy_inputs())
    _stack(stage)
    owned = {p.untyped_storage().data_ptr() for p in stage.model.parameters()}
    after = check_pass(stage.normalized, _Vectorize(stage), [], {})
    for name in ("storeys_0_layer_experts", "storeys_1_layer_experts"):
        held = list(after.get_submodule(name).buffers())
        assert len(held) == 3 and all(stack.untyped_storage().data_ptr() in owned for stack in held)
