"""Stacking gives experts one storage and nothing else: no second copy, the same values, the same Parameter objects."""

import torch
from torch import nn

from moeca_fx.graph.expert_stack import stack_in_place, stacked_view
from tests.helpers.toys import Wedge


def _experts(count: int = 3) -> nn.ModuleList:
    return nn.ModuleList(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)) for _ in range(count))


def _storages(module: nn.Module) -> set[int]:
    return {p.untyped_storage().data_ptr() for p in module.parameters()}


def _bytes(module: nn.Module) -> int:
    return sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in module.parameters()}.values())


def test_one_storage_for_each_parameter_and_no_second_copy() -> None:
    experts = _experts()
    before = _bytes(experts)
    stack_in_place(list(experts))
    assert len(_storages(experts)) == 4  # two weights and two biases
    assert _bytes(experts) == before


def test_values_parameters_and_flags_stay() -> None:
    experts = _experts()
    experts[0][0].weight.requires_grad_(False)
    expected = {name: value.clone() for name, value in experts.state_dict().items()}
    identity = {name: (id(p), p.requires_grad) for name, p in experts.named_parameters()}
    stack_in_place(list(experts))
    assert {name: (id(p), p.requires_grad) for name, p in experts.named_parameters()} == identity
    assert all(isinstance(p, nn.Parameter) for p in experts.parameters())
    for name, value in experts.state_dict().items():
        assert torch.equal(value, expected[name])


def test_a_second_run_does_nothing() -> None:
    experts = _experts()
    stack_in_place(list(experts))
    places = [p.data_ptr() for p in experts.parameters()]
    stack_in_place(list(experts))
    assert [p.data_ptr() for p in experts.parameters()] == places


def test_the_view_reads_and_writes_the_experts() -> None:
    experts = _experts()
    weights = [expert[0].weight for expert in experts]
    assert stacked_view(weights) is None
    stack_in_place(list(experts))
    view = stacked_view(weights)
    assert view is not None and view.shape == (3, 6, 4)
    assert all(torch.equal(view[i], weight) for i, weight in enumerate(weights))
    assert view.data_ptr() == weights[0].data_ptr()
    with torch.no_grad():
        weights[1].fill_(3.0)
    assert bool((view[1] == 3.0).all()) and not bool((view[2] == 3.0).any())


def test_slices_in_another_order_or_with_gaps_are_no_stack() -> None:
    stack = torch.randn(4, 2, 3)
    assert stacked_view(list(stack)) is not None
    assert stacked_view([stack[1], stack[0]]) is None
    assert stacked_view([stack[0], stack[2]]) is None
    assert stacked_view(list(stack.transpose(1, 2))) is None  # not contiguous


def test_moving_breaks_the_stack_and_stacking_again_repairs_it() -> None:
    experts = nn.ModuleList(Wedge() for _ in range(3))
    stack_in_place(list(experts))
    experts.double()
    assert stacked_view([expert.a.weight for expert in experts]) is None
    stack_in_place(list(experts))
    assert stacked_view([expert.a.weight for expert in experts]) is not None
