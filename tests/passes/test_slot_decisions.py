"""slot_decisions: which decisions are rewritten; that results and counts stay is shown in `test_forced_step`."""

import operator

import pytest
import torch
from torch import fx

from moeca_fx.ops import rows, slot_decisions, slots
from moeca_fx.passes.slot_decisions import rewrite_decisions
from moeca_fx.policies import branch

NAMES = ("expert", "weight", "held", "then", "norm", "limit", "force", "values")


def _graph(*, forced: bool = True, reads: str = "mask") -> fx.GraphModule:
    """A decision of all tokens, of which rows are written over; `reads` is what is read of it beside that."""
    graph = fx.Graph()
    inputs = {name: graph.placeholder(name) for name in NAMES}
    operands = [inputs[name] for name in NAMES[:6]]
    made = graph.call_function(branch.decide, (*operands, 0.5, 0.25, "share"), {"code_dtype": torch.int64})
    slot, slot_expert, slot_weight, code = (graph.call_function(operator.getitem, (made, i)) for i in range(4))
    if forced:
        code = graph.call_function(slots.forced_code, (code, inputs["force"]))
    mask = graph.call_function(slots.token_mask, (code,))
    row = graph.call_function(rows.select_rows, (mask,))
    by_slot = graph.call_function(branch.to_slots, (inputs["weight"], slot))
    taken = [graph.call_function(torch.index_select, (inputs["values"], 0, row))]
    taken.append(graph.call_function(torch.Tensor.long, (taken[0],)))
    written = [graph.call_function(rows.write_rows, (by_slot, row, taken[0]))]
    written.append(graph.call_function(rows.write_rows, (slot_expert, row, taken[1])))
    others = {"mask": mask, "code": code, "slot": slot, "expert": slot_expert, "weight": slot_weight}
    graph.output((*written, others[reads]))
    graph.eliminate_dead_code()
    return fx.GraphModule(torch.nn.Module(), graph)


def _inputs(force: bool) -> tuple[torch.Tensor, ...]:
    """Tokens that match in another order, and two that do not; the first one's weights are zero."""
    made = torch.Generator().manual_seed(0)
    expert = torch.stack([torch.randperm(6, generator=made)[:3] for _ in range(8)]).view(2, 4, 3)
    weight, then, norm = (torch.rand(2, 4, 3, generator=made) for _ in range(3))
    held = expert.roll(1, -1)
    held[0, 0], held[1, 2] = torch.tensor([-1, -1, -1]), held[1, 2].add(1) % 6
    weight[0, 0] = 0
    limit = torch.rand(2, 6, generator=made) + 0.6
    return expert, weight, held, then, norm, limit, torch.tensor(force), torch.arange(24.0).view(8, 3)


def _targets(module: fx.GraphModule) -> set[object]:
    return {node.target for node in module.graph.nodes}


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize(
    ("reads", "becomes"),
    [
        ("mask", slot_decisions.refreshed_tokens),
        ("code", slot_decisions.decide_slots),
        ("expert", slot_decisions.decide_slots),
        ("weight", slot_decisions.decide_slots),
        ("slot", branch.decide),  # places themselves
    ],
)
def test_what_becomes_of_a_decision(reads: str, becomes: object, forced: bool) -> None:
    expected, module = _graph(forced=forced, reads=reads), _graph(forced=forced, reads=reads)
    assert rewrite_decisions(module) == (becomes is not branch.decide)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    kinds = {branch.decide, slot_decisions.decide_slots, slot_decisions.refreshed_tokens}
    assert _targets(module) & kinds == {becomes}
    assert rewrite_decisions(module) == 0
    for force in (False, True):
        results = zip(module(*_inputs(force)), expected(*_inputs(force)), strict=True)
        assert all(torch.equal(have, want) for have, want in results)


def test_slots_that_others_read_are_paired() -> None:
    module = _graph()
    (expert,) = (node for node in module.graph.nodes if node.target is operator.getitem and node.args[1] == 1)
    with module.graph.inserting_after(expert):
        other = module.graph.call_function(torch.neg, (expert,))
    output = module.graph.output_node()
    output.args = ((*output.args[0], other),)  # type: ignore[misc]  # a tuple
    rewrite_decisions(module)
    assert slot_decisions.refreshed_tokens not in _targets(module)
