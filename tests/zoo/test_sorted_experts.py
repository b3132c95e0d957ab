"""Training's experts: what the model's own loop computes, forward and backward, for any routing."""

import pytest
import torch

from moeca_fx.zoo.dsmoe import RoutedExperts
from moeca_fx.zoo.training.sorted_experts import sorted_experts

EXPERTS, TOP_K, ROWS = 6, 3, 150

ROUTINGS = {
    "spread": lambda score: score.topk(TOP_K).indices,
    "an expert without tokens": lambda score: score[:, :-1].topk(TOP_K).indices,
    "all to the same": lambda score: torch.arange(TOP_K).expand(ROWS, TOP_K),
}


def outcome(experts, hidden, index, weight):
    """Output and gradients of hidden, weight and every parameter; zero where the loop leaves none."""
    experts.zero_grad()
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    out = experts(hidden, index, weight)
    out.sin().sum().backward()
    grads = [torch.zeros_like(value) if value.grad is None else value.grad for value in experts.parameters()]
    return [out.detach(), hidden.grad, weight.grad, *(grad.clone() for grad in grads)]


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_values_and_gradients_are_those_of_the_loop(routing, dtype, tolerance):
    torch.manual_seed(5)
    experts = RoutedExperts(EXPERTS, 16, 8).to(dtype)
    hidden, weight = torch.randn(ROWS, 16, dtype=dtype), torch.rand(ROWS, TOP_K, dtype=dtype)
    index = ROUTINGS[routing](torch.rand(ROWS, EXPERTS))
    expected = outcome(experts, hidden, index, weight)
    with sorted_experts(experts):
        found = outcome(experts, hidden, index, weight)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


def test_mixed_precision_stays_near_the_loop():
    torch.manual_seed(6)
    experts = RoutedExperts(EXPERTS, 16, 8)
    hidden, weight = torch.randn(ROWS, 16), torch.rand(ROWS, TOP_K)
    index = torch.rand(ROWS, EXPERTS).topk(TOP_K).indices
    expected = outcome(experts, hidden, index, weight)
    with sorted_experts(experts), torch.autocast("cpu", torch.bfloat16):
        found = outcome(experts, hidden, index, weight)
    assert found[0].dtype == torch.float32
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_the_loop_is_back_afterwards():
    experts = RoutedExperts(EXPERTS, 16, 8)
    with pytest.raises(RuntimeError, match="stop"), sorted_experts(experts):
        assert "forward" in vars(experts)
        raise RuntimeError("stop")
    assert "forward" not in vars(experts)
