"""ToCa and DuCa on a block of four tokens that can be followed by hand."""

import pytest
import torch
from torch import Tensor

from tests.policies.peers.hand_model import HandBlock, HandModel, constant, inputs
from tests.reference.peers import DuCa, ToCa

TOKENS = {0: (1.0, 2.0, 3.0, 4.0), 1: (5.0, 6.0, 7.0, 8.0), 2: (0.0, 1.0, 0.0, 0.0), 3: (1.0, 1.0, 1.0, 1.0)}


class EvenToCa(ToCa):
    """ToCa whose attention prefers no token."""

    def attention_score(self, index: int, inputs: Tensor) -> list[float]:
        return [0.5] * inputs.shape[0]


class EvenDuCa(DuCa):
    """DuCa whose attention prefers no token."""

    def attention_score(self, index: int, inputs: Tensor) -> list[float]:
        return [0.5] * inputs.shape[0]


def _block() -> HandBlock:
    """Attention 10 x, feed-forward x + t; gates 1; the norms change nothing."""
    return HandBlock(shift_a=constant(0.0), shift_f=lambda t: t, attn=lambda z: 10 * z, blind=False)


def _run(reference: ToCa, steps: int) -> Tensor:
    """Predictions [steps, 4] at t = 0, 1, 2, ..."""
    return torch.stack([reference(*inputs(float(j), *TOKENS[j])).flatten() for j in range(steps)])


def _rows(model: HandModel) -> list[tuple[int, int]]:
    """Rows that attention and feed-forward of each block computed."""
    return [(block.attn.rows, block.mlp.rows) for block in model.blocks if isinstance(block, HandBlock)]


def _same(found: Tensor, expected: list[list[float]]) -> bool:
    return torch.allclose(found, torch.tensor(expected, dtype=torch.float64))


def test_toca_by_hand() -> None:
    """Eight steps: full at 0 and 3 (see the schedule's test); the ratio at 1 and 2 is .1 * 1.8 * 2.5 * (.8, .9): one
    token of four.

    0: attention 10 x, then feed-forward 11 x: 22 x.
    1: attention still 10, 20, 30, 40: 15, 26, 37, 48. All are of age 0: token 0 is the first of equals, feed-forward
       15 + 1; the others 22, 33, 44.
    2: 10, 21, 30, 40. Token 0 is of age 0, the others of age 1: token 1, 21 + 2; token 0 keeps the 16 of step 1.
    3: full: 1 + 10, then 11 + 3.
    """
    model = HandModel(_block())
    reference = EvenToCa(model, steps=8, fresh_ratio=0.1)
    expected: list[list[float]] = [[22, 44, 66, 88], [31, 48, 70, 92], [26, 44, 63, 84], [25, 25, 25, 25]]
    assert _same(_run(reference, 4), expected)
    assert reference.kinds == ["full", "toca", "toca", "full"]
    assert _rows(model) == [(8, 4 + 1 + 1 + 4)]


def test_toca_may_recompute_nothing() -> None:
    """The last of two layers has a ratio of .1 * .2 * 2.5 * .8: none of four tokens."""
    model = HandModel(_block(), _block())
    _run(EvenToCa(model, steps=8, fresh_ratio=0.1), 3)
    assert _rows(model) == [(4, 4 + 1 + 1), (4, 4)]


def test_duca_by_hand() -> None:
    """As ToCa at 0 and 1; step 2 puts the tokens after the block at step 1 through the final layer (+ 100 t)."""
    model = HandModel(_block(), final=100.0)
    reference = EvenDuCa(model, steps=8, fresh_ratio=0.1)
    expected: list[list[float]] = [[22, 44, 66, 88], [131, 148, 170, 192], [231, 248, 270, 292], [325] * 4]
    assert _same(_run(reference, 4), expected)
    assert reference.kinds == ["full", "toca", "aggressive", "full"]
    assert _rows(model) == [(8, 4 + 1 + 4)]


def test_duca_alternates_within_a_cycle() -> None:
    """Eight steps: full at 0, 3, 7. At 4 one token is computed, the first of equals; at 6 two (a ratio of .585): the
    first of those older than token 0 leads its block, the next older one follows. At 5 nothing ages.
    """
    reference = EvenDuCa(HandModel(_block()), steps=8, fresh_ratio=0.1)
    ages = []
    for j in range(8):
        reference(*inputs(float(j), 1.0, 2.0, 3.0, 4.0))
        ages.append(reference.ages[0][0])
    assert ages[3:] == [[0] * 4, [0, 1, 1, 1], [0, 1, 1, 1], [1, 0, 0, 2], [0] * 4]
    cycles = [["full", "toca", "aggressive"], ["full", "toca", "aggressive", "toca"], ["full"]]
    assert reference.kinds == [kind for cycle in cycles for kind in cycle]


def test_age_beats_attention() -> None:
    """s1 = .6, .4, .4, .4 and no bonus: token 0 at step 1; at step 2 the others are at .4 + weight / 4."""

    class FirstToCa(ToCa):
        def attention_score(self, index: int, inputs: Tensor) -> list[float]:
            return [0.6, 0.4, 0.4, 0.4]

    chosen = []
    for weight in (0.25, 1.0):
        reference = FirstToCa(HandModel(_block()), steps=8, fresh_ratio=0.1, age_weight=weight, bonus=0.0)
        _run(reference, 3)
        chosen.append(reference.ages[0][0])
    assert chosen == [[0, 2, 2, 2], [1, 0, 2, 2]]


def test_the_trajectory_may_not_be_longer_than_said() -> None:
    reference = EvenToCa(HandModel(_block()), steps=2)
    _run(reference, 2)
    with pytest.raises(ValueError, match="2 steps"):
        reference(*inputs(2.0, *TOKENS[2]))
