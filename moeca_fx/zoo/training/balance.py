"""Auxiliary-loss-free load balance: nudge each router's correction bias by the sign of the load error.

The rule of DeepSeek-V3 (arXiv 2412.19437, section 2.1.2): after each step an expert that received fewer
tokens than the mean gets a larger bias, one that received more a smaller one. The bias moves the choice,
never the weights.
"""

from typing import Any

import torch
from torch import Tensor, nn

from moeca_fx.zoo.dsmoe import DSMoE, MoELayer, RoutedExperts


class LoadBalancer:
    """Counts the branches of every expert during a forward pass and updates the biases when told.

    Args:
        model: its MoE layers are watched with forward pre-hooks until `close`.
        rate: size of one nudge.
    """

    def __init__(self, model: DSMoE, rate: float) -> None:
        self.rate = rate
        self.layers = [module for module in model.modules() if isinstance(module, MoELayer)]
        self.counts = [torch.zeros(layer.config.num_experts) for layer in self.layers]
        self._handles = [
            layer.experts.register_forward_pre_hook(self._counter(i)) for i, layer in enumerate(self.layers)
        ]

    def _counter(self, i: int) -> Any:
        def count(experts: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> None:
            assert isinstance(experts, RoutedExperts)
            self.counts[i] += torch.bincount(args[1].flatten(), minlength=experts.num_experts)

        return count

    @torch.no_grad()
    def update(self) -> float:
        """Nudge every bias and forget the counts.

        Returns:
            The worst imbalance seen: the busiest expert's load over the mean load (1 is perfect balance).
        """
        worst = 1.0
        for layer, count in zip(self.layers, self.counts, strict=True):
            layer.gate.e_score_correction_bias += self.rate * torch.sign(count.mean() - count)
            worst = max(worst, float(count.max() / count.mean().clamp(min=1)))
            count.zero_()
        return worst

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
