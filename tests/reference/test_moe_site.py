"""The reference itself, on numbers small enough to work out by hand (the working is in the comments)."""

import math

import pytest
import torch

from tests.reference import moe_site
from tests.reference.moe_site import Slot


def _slot(expert: int, weight: float, *feature: float) -> Slot:
    return Slot(expert, weight, torch.tensor(feature, dtype=torch.float64))


def test_match_finds_the_slot_of_each_expert() -> None:
    assert moe_site.match([7, 4, 9], [9, 7, 2]) == [1, None, 0]


def test_share_ignores_the_routers_scale() -> None:
    assert moe_site.share([0.5, 1.5]) == [0.25, 0.75]
    assert moe_site.share([5.0, 15.0]) == [0.25, 0.75]
    assert moe_site.share([0.0, 0.0]) == [0.0, 0.0]


def test_contribution_compares_norms() -> None:
    # norms 5 (3-4-5) and 15 (9-12-15): 5/20 and 15/20
    features = [torch.tensor([3.0, 4.0]), torch.tensor([-9.0, 12.0])]
    assert moe_site.contribution(features) == [0.25, 0.75]
    assert moe_site.contribution([torch.zeros(2), torch.zeros(2)]) == [0.0, 0.0]


def test_score_adds_weight_drift_and_contribution() -> None:
    # 0.5 + 2 * |0.5 - 0.75| + 4 * 0.125 = 0.5 + 0.5 + 0.5
    assert moe_site.score(0.5, 0.75, 0.125, 2.0, 4.0) == 1.5


def test_activation_is_a_moving_average_of_selection() -> None:
    # expert 0: token 0 not selected 0.75 * 0.5; token 1 selected 0.75 * 0 + 0.25. Expert 1 the other way.
    assert moe_site.update_activation([[0.5, 0.0], [0.0, 1.0]], [[1], [0]], 0.75) == [
        [0.375, 0.25],
        [0.25, 0.75],
    ]


def test_entropy_by_hand() -> None:
    assert moe_site.entropy([0.0, 0.0]) == 0.0
    assert moe_site.entropy([0.3, 0.0]) == 0.0
    assert moe_site.entropy([2.0, 2.0]) == pytest.approx(math.log(2))
    # P = 1/4, 3/4
    assert moe_site.entropy([1.0, 3.0]) == pytest.approx(0.25 * math.log(4) + 0.75 * math.log(4 / 3))


def test_thresholds_minmax() -> None:
    # entropies 0 (concentrated), log 4 (uniform), log 2 (half way): tau = 0.8 * (1 -/+ 0.6), 0.8 half way
    activation = [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 0.0, 1.0]]
    assert moe_site.thresholds(activation, 0.8, 0.6, "minmax") == pytest.approx([0.32, 1.28, 0.8])


def test_thresholds_minmax_is_neutral_when_all_experts_are_alike() -> None:
    assert moe_site.thresholds([[1.0, 1.0], [0.5, 0.5]], 0.8, 0.6, "minmax") == [0.8, 0.8]
    # the same multiset in another order: the sums may round differently, the experts are still alike
    assert moe_site.thresholds([[0.1, 0.2, 0.7], [0.7, 0.1, 0.2]], 0.8, 0.6, "minmax") == [0.8, 0.8]


def test_thresholds_log() -> None:
    # log 2 / log 4 = 1/2: neutral. The never selected expert counts as fully concentrated.
    activation = [[0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]]
    assert moe_site.thresholds(activation, 1.0, 0.5, "log") == pytest.approx([1.0, 0.5])
    assert moe_site.thresholds([[1.0], [0.0]], 1.0, 0.5, "log") == [1.0, 1.0]


def test_scores_of_matched_branches() -> None:
    slots = [_slot(3, 0.5, 3.0, 4.0), _slot(1, 0.5, 0.0, 15.0)]
    # branch 0 (expert 1): 0.25 + 2 * 0.25 + 1 * 15/20 = 1.5; branch 1 (expert 0) is not in the cache
    assert moe_site.branch_scores([1, 0], [0.25, 0.75], slots, 2.0, 1.0) == [1.5, None]


def test_decision_recomputes_unmatched_and_over_threshold() -> None:
    assert moe_site.decide([1, 0], [1.5, None], [9.0, 1.4]) == [True, True]
    assert moe_site.decide([1, 0], [1.5, None], [9.0, 1.6]) == [False, True]


def test_a_score_equal_to_the_threshold_is_reused() -> None:
    assert moe_site.decide([0], [1.5], [1.5]) == [False]


def test_slots_matched_stay_and_unmatched_fill_the_gaps_in_order() -> None:
    # cache holds 5 8 2 9; 8 stays in slot 1 and 9 in slot 3, so 7 and 4 take slots 0 and 2 in that order
    assert moe_site.assign_slots([9, 7, 8, 4], [5, 8, 2, 9]) == [3, 0, 1, 2]


def test_update_keeps_reused_slots_and_writes_recomputed_ones() -> None:
    slots = [_slot(5, 0.1, 1.0), _slot(8, 0.2, 2.0), _slot(2, 0.7, 3.0)]
    new_8, new_4 = torch.tensor([20.0]), torch.tensor([40.0])
    # branches: 2 reused, 4 unmatched (takes slot 0, which 5 left), 8 recomputed in place
    updated = moe_site.update_slots(slots, [2, 4, 8], [0.3, 0.3, 0.4], [None, new_4, new_8])
    assert [slot.expert for slot in updated] == [4, 8, 2]
    assert [slot.weight for slot in updated] == [0.3, 0.4, 0.7]  # the reused slot keeps its old weight
    assert updated[2] is slots[2]
    assert updated[0].feature is new_4
    assert updated[1].feature is new_8


def test_combine_uses_the_current_weights() -> None:
    result = moe_site.combine([0.5, 2.0], [torch.tensor([2.0, 4.0]), torch.tensor([1.0, -1.0])])
    assert result.tolist() == [3.0, 0.0]


@pytest.mark.parametrize(
    "call", [lambda: moe_site.normalized_entropies([[1.0]], "x"), lambda: moe_site.score_values([1.0], "x")]
)
def test_unknown_choices_are_refused(call: object) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match="expected"):
        call()
