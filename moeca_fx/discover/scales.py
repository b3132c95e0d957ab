"""Whether every expert enters the sum with the weight that was found, to a fraction of a percent, in any dtype.

The largest error of a bf16 sum hides an expert that is one percent off. Projected on that expert's own contribution,
rounding averages out over tokens and channels, and a wrong factor does not.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

ALLOWED = 4e-3
SURE = 4.0  # standard deviations of the rounding error


def off_scale(
    experts: Sequence[nn.Module], x: Tensor, expert: Tensor, weight: Tensor, routed: Tensor, rounded: Tensor
) -> str | None:
    """None when every expert has its weight; else which one has not, and by how much.

    Args:
        experts: one module an expert.
        x, expert, weight: rows [..., H], ids and weights, k a row.
        routed: what the model computed for ``sum_k weight_k * expert_k(x)`` [N, H], fp64.
        rounded: the value of the model that `routed` was taken from, in its dtype: its rounding is the noise.
    """
    tokens = x.reshape(-1, x.shape[-1])
    ids, scale = expert.reshape(tokens.shape[0], -1), weight.reshape(tokens.shape[0], -1).double()
    parts = []
    total = torch.zeros_like(routed)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for index, module in enumerate(experts):
            token, slot = torch.where(ids == index)
            part = module(tokens[token]).double() * scale[token, slot].unsqueeze(-1) if token.numel() else None
            parts.append((token, part))
            if part is not None:
                total.index_add_(0, token, part)
    left = routed - total
    step = torch.finfo(rounded.dtype).eps / 12**0.5
    for index, (token, part) in enumerate(parts):
        size = float(part.square().sum()) if part is not None else 0.0
        if part is None or not size > 0:
            continue
        off = float((left[token] * part).sum()) / size
        noise = step * float((rounded.reshape(routed.shape)[token].double() * part).norm()) / size
        if abs(off) > max(ALLOWED, SURE * noise):
            return f"expert {index} enters the sum with {1 + off:.4f} times its routing weight"
    return None
