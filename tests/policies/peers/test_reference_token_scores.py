"""ToCa's score and choice of tokens on numbers worked out by hand."""

import math

import pytest
import torch
from torch import nn

from moeca_fx.zoo.attention import Attention
from tests.helpers.zoo_models import tiny_dsmoe
from tests.reference.peers import token_scores


def _attention_of(block: nn.Module) -> Attention:
    attn = block.get_submodule("attn")
    assert isinstance(attn, Attention)
    return attn


def test_attention_score_sums_what_each_key_receives() -> None:
    """Columns receive 1.2 and 0.9 (rows need not be softmaxed here); norm 1.5."""
    assert token_scores.attention_score(torch.tensor([[0.5, 0.4], [0.7, 0.5]])) == pytest.approx([0.8, 0.6])


def test_attention_map_is_the_models() -> None:
    """With one head, the map times the values through the output projection is the attention's output."""
    block = tiny_dsmoe(num_heads=1).double().requires_grad_(False).blocks[0]
    attn = _attention_of(block)
    inputs = torch.randn(16, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    map_ = token_scores.attention_map(block, inputs)
    assert map_.sum(dim=1).tolist() == pytest.approx([1.0] * 16)
    values = attn.qkv(inputs)[:, 64:]
    assert torch.allclose(attn.proj(map_ @ values), attn(inputs[None])[0])


def test_attention_map_averages_the_heads() -> None:
    """Two heads, all queries 0 in the first, so that it attends evenly: map = (1 / T + second head) / 2."""
    block = tiny_dsmoe().double().requires_grad_(False).blocks[0]
    attn = _attention_of(block)
    attn.qkv.weight[:16] = 0
    attn.qkv.bias[:16] = 0
    inputs = torch.randn(16, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    map_ = token_scores.attention_map(block, inputs)
    assert float(map_.min()) >= 1 / 32
    assert float(map_.max()) > 1 / 16


def test_age_adds_a_share_of_the_cycle() -> None:
    assert token_scores.with_age([0.5, 0.25], [1, 3], weight=0.25, interval=4) == [0.5625, 0.4375]


def test_block_bonus_goes_to_the_best_of_each_two_by_two() -> None:
    """The blocks of a 4 x 4 grid, by their corners; equal ones: the first in row-major order wins."""
    scores = [
        *(1.0, 2.0, 5.0, 5.0),
        *(4.0, 3.0, 5.0, 5.0),
        *(0.0, 0.0, 1.0, 1.0),
        *(0.0, 8.0, 1.0, 2.0),
    ]
    expected = list(scores)
    expected[4], expected[2], expected[13], expected[15] = 6.0, 7.5, 12.0, 3.0
    raised, lead = token_scores.with_block_bonus(scores, bonus=0.5)
    assert raised == expected
    assert lead == 0.0  # the block of fives is tied
    assert token_scores.with_block_bonus([1.0, 2.0, 4.0, 3.0], 0.5) == ([1.0, 2.0, 6.0, 3.0], 1.0)


def test_best_tokens_prefer_the_lower_index_of_equals() -> None:
    assert token_scores.best_tokens([1.0, 3.0, 3.0, 3.0], 2) == ([1, 2], 0.0)
    assert token_scores.best_tokens([1.0, 3.0, 2.5, 7.0], 2) == ([1, 3], 0.5)
    assert token_scores.best_tokens([1.0, 2.0], 0) == ([], math.inf)
    assert token_scores.best_tokens([1.0, 2.0], 2) == ([0, 1], math.inf)
