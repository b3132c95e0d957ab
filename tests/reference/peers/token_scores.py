"""ToCa's choice of tokens for one sample, in plain Python (arXiv 2410.05317): scores are lists of T numbers."""

import math

import torch
from torch import Tensor, nn

from tests.reference import blocks

BLOCK = 2  # side of the spatial blocks in which the best token gets the bonus


def fresh_ratio(base: float, layer: int, layers: int, s: int, steps: int) -> float:
    """r(l, s) = base * (1.8 - 1.6 l / (L - 1)) * (1.4 - 0.8 s / T_s) * 2.5, within [0, 1]; l / (L - 1) = 0 if L = 1."""
    depth = layer / (layers - 1) if layers > 1 else 0.0
    ratio = base * (1.8 - 1.6 * depth) * (1.4 - 0.8 * s / steps) * 2.5
    return min(max(ratio, 0.0), 1.0)


def fresh_count(ratio: float, tokens: int) -> int:
    """How many of T tokens a ratio stands for: rounded down, possibly none."""
    return int(ratio * tokens)


def attention_map(block: nn.Module, inputs: Tensor) -> Tensor:
    """Softmax maps averaged over the heads, [T queries, T keys], of one sample's attention inputs [T, H]."""
    query, key, _ = blocks.queries_keys_values(block, inputs)  # [T, h, d]
    heads = [
        torch.softmax(query[:, head] @ key[:, head].T / math.sqrt(query.shape[-1]), dim=-1)
        for head in range(query.shape[1])
    ]
    return torch.stack(heads).mean(0)


def attention_score(map_: Tensor) -> list[float]:
    """s1: how much attention each key gets, column sums of the map [T, T], divided by their L2 norm over tokens."""
    received = map_.sum(dim=0)
    return [float(value) for value in received / received.norm()]


def with_age(scores: list[float], ages: list[int], weight: float, interval: int) -> list[float]:
    """s + weight * age / N."""
    return [score + weight * age / interval for score, age in zip(scores, ages, strict=True)]


def with_block_bonus(scores: list[float], bonus: float) -> tuple[list[float], float]:
    """The best token of each 2 x 2 block of the row-major token grid gets `bonus` x its own score on top.

    Of equal tokens the first in row-major order is the best. Also returns the smallest lead of a best token.
    """
    side = math.isqrt(len(scores))
    assert side * side == len(scores) and side % BLOCK == 0, "ToCa needs a square token grid of even side"
    raised, lead = list(scores), math.inf
    for top in range(0, side, BLOCK):
        for left in range(0, side, BLOCK):
            members = [(top + row) * side + left + column for row in range(BLOCK) for column in range(BLOCK)]
            ranked = sorted(members, key=lambda token: (-scores[token], token))
            lead = min(lead, scores[ranked[0]] - scores[ranked[1]])
            raised[ranked[0]] += bonus * scores[ranked[0]]
    return raised, lead


def best_tokens(scores: list[float], count: int) -> tuple[list[int], float]:
    """The `count` tokens of the highest scores, of equal ones the lower index first, in ascending order.

    Also returns the gap between the last chosen and the first left out.
    """
    ranked = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    gap = scores[ranked[count - 1]] - scores[ranked[count]] if 0 < count < len(scores) else math.inf
    return sorted(ranked[:count]), gap
