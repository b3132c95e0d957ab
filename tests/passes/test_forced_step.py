"""insert_forced_cache and lower_export: one graph for full and cached steps, and its form for export."""

import pytest
import torch
from torch import Tensor, fx

from moeca_fx import MoECa
from moeca_fx.errors import ExportError
from moeca_fx.graph.state import StateSpec
from moeca_fx.ops import rows, slots
from moeca_fx.passes.insert_cache import insert_forced_cache, share_copy
from moeca_fx.passes.lower_export import lower_export
from moeca_fx.policies.rules import BranchRule
from moeca_fx.runtime.module import TransformedModel
from tests.helpers import zoo_models
from tests.helpers.grids import slow, spread
from tests.helpers.transformed import SOME, zoo_pair
from tests.helpers.zoo_models import Family

pytestmark = pytest.mark.filterwarnings("ignore::moeca_fx.NothingReusedWarning")

POLICIES = {
    "some": SOME,
    "nothing": MoECa(tau0=50.0),
    "everything": MoECa(tau0=0.0),
    "reused": MoECa(tau0=0.6, attention="reuse", dense_ffn="reuse", shared_expert="reuse"),
    "in full": MoECa(tau0=0.6, attention="full", dense_ffn="full", shared_expert="full"),
}


def _forced(fast: TransformedModel) -> tuple[fx.GraphModule, tuple[StateSpec, ...], int]:
    (program,) = fast._moeca.programs.values()
    assert fast._moeca.policy is not None
    rule = fast._moeca.policy.rules[0]
    assert isinstance(rule, BranchRule)
    step = insert_forced_cache(program.traced_module, program.sites, rule)
    return step.module, step.reads, program.outputs


def _trajectory(
    module: fx.GraphModule, states: tuple[StateSpec, ...], outputs: int, steps: list[tuple[Tensor, ...]], interval: int
) -> list[tuple[Tensor, Tensor]]:
    """(result, counters) of each step, from caches that hold nothing yet."""
    batch = len(steps[0][0])
    held = [torch.full((batch, *state.shape), state.empty, dtype=state.dtype) for state in states]
    made = []
    with torch.no_grad():
        for index, inputs in enumerate(steps):
            found = module(*inputs, *held, torch.tensor(index % interval == 0))
            held = list(found[outputs : outputs + len(states)])
            made.append((found[0], found[-1]))
    return made


@pytest.mark.parametrize(("policy", "family"), spread(list(POLICIES), ["dsmoe", "ditmoe-packed"]))
def test_a_trajectory_equals_that_of_two_graphs(family: Family, policy: str) -> None:
    _, fast = zoo_pair(family, POLICIES[policy])
    steps = list(zoo_models.trajectory(3, 6))
    module, states, outputs = _forced(fast)
    found = _trajectory(module, states, outputs, steps, interval=4)
    with torch.no_grad():
        for (result, _), inputs in zip(found, steps, strict=True):
            torch.testing.assert_close(result, zoo_models.prediction(fast(*inputs)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("policy", "family", "batch"),
    [(name, "dsmoe", 3) for name in POLICIES]
    + [("some", "ditmoe-packed", 1)]
    + [slow(name, "dsmoe", 1) for name in POLICIES]
    + [slow(name, "ditmoe", batch) for name in POLICIES for batch in (1, 3)],
)
def test_the_form_for_export_computes_and_counts_the_same(family: Family, policy: str, batch: int) -> None:
    _, fast = zoo_pair(family, POLICIES[policy])
    steps = list(zoo_models.trajectory(batch, 6))
    expected = _trajectory(*_forced(fast), steps, interval=4)
    module, states, outputs = _forced(fast)
    found = _trajectory(lower_export(module), states, outputs, steps, interval=4)
    for (have, counted), (want, counts) in zip(found, expected, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-5)
        assert torch.equal(counted, counts)


@pytest.mark.parametrize("family", ["dsmoe", "ditmoe"])
def test_the_model_without_caches(family: Family) -> None:
    _, fast = zoo_pair(family, None)  # type: ignore[arg-type]  # no policy
    (program,) = fast._moeca.programs.values()
    lowered = lower_export(share_copy(program.traced_module))
    inputs = zoo_models.inputs(3, seed=4)
    with torch.no_grad():
        expected = program.traced_module(*inputs)[0]
        torch.testing.assert_close(lowered(*inputs)[0], expected, rtol=1e-5, atol=1e-5)


def test_an_operation_without_a_form_is_named() -> None:
    graph = fx.Graph()
    mask = graph.placeholder("mask")
    graph.output((graph.call_function(slots.unmatched_rows, (graph.call_function(rows.select_rows, (mask,)),)),))
    lower_export(fx.GraphModule(torch.nn.Module(), graph))  # selections have one
    graph = fx.Graph()
    cache, row = graph.placeholder("cache"), graph.placeholder("row")
    graph.output((graph.call_function(rows.write_rows, (cache, row, row), name="stray"),))
    with pytest.raises(ExportError, match=r"stray .* has a length that depends on data and no form for export"):
        lower_export(fx.GraphModule(torch.nn.Module(), graph))
