"""The routed sum computed expert by expert in fp64: what regions are proven against."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moeca_fx.autocast import computed_in

# Largest accepted error relative to the largest output. The reference accumulates in fp64, the model in its own dtype.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def tolerance_of(dtype: torch.dtype) -> float:
    """`TOLERANCE` of values of a dtype under the autocast of now; 0 for numbers that are not rounded."""
    return TOLERANCE.get(computed_in(dtype), 0.0)


def branch_sum(experts: Sequence[nn.Module], x: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
    """``sum_k weight_k * expert_k(x)`` in fp64: experts one after the other.

    Args:
        experts: one module an expert.
        x: token rows [..., H].
        expert: ids, k a row; those outside of the experts stand for none.
        weight: routing weights, k a row.

    Returns:
        [N, H] fp64.
    """
    tokens = x.reshape(-1, x.shape[-1])
    ids = expert.reshape(tokens.shape[0], -1)  # [N, k]
    scale = weight.reshape(tokens.shape[0], -1).double()
    total = None
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for index, module in enumerate(experts):
            token, slot = torch.where(ids == index)
            if token.numel():
                contribution = module(tokens[token]).double() * scale[token, slot].unsqueeze(-1)
                if total is None:
                    total = contribution.new_zeros(tokens.shape[0], contribution.shape[-1])
                total.index_add_(0, token, contribution)
    return torch.zeros(tokens.shape, dtype=torch.float64, device=x.device) if total is None else total


def choice_as_tokens(x: Tensor, token: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens chosen by experts as one slot a token and expert: ids [N, E], E where not chosen, and weights [N, E].

    Args:
        x: token rows of all samples [.., H].
        token: tokens within their sample [B, E, C], distinct in a row.
        weight: of the same shape.
    """
    samples, count, _ = token.shape
    tokens = x.numel() // x.shape[-1] // samples
    dense = weight.new_zeros(samples, count, tokens).scatter(-1, token, weight)
    chosen = torch.zeros_like(dense, dtype=torch.bool).scatter(-1, token, True)
    numbers = torch.arange(count, device=token.device).view(1, count, 1)
    ids = torch.where(chosen, numbers, count).transpose(1, 2).reshape(-1, count)
    return ids, dense.transpose(1, 2).reshape(-1, count)
