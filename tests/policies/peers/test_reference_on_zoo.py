"""Every reference on the zoo's families: equal to the model where everything is computed, and only there."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.helpers.zoo_models import FAMILIES, Family, prediction, relative_error
from tests.policies.peers.cases import tiny_double, trajectory
from tests.reference.peers import FORA, DBCache, DuCa, FirstBlockCache, Forecast, Reference, TaylorSeer, TeaCache, ToCa

STEPS = 10
Make = Callable[[torch.nn.Module], Reference]

SOME: dict[str, Make] = {
    "forecast": lambda m: Forecast(m, order=2, interval=3),
    "fora": lambda m: FORA(m, interval=3),
    "taylorseer": lambda m: TaylorSeer(m, order=2, interval=3),
    "toca": lambda m: ToCa(m, STEPS, interval=4, fresh_ratio=0.15),
    "duca": lambda m: DuCa(m, STEPS, interval=4, fresh_ratio=0.15),
    "teacache": lambda m: TeaCache(m, STEPS, threshold=0.6),
    "dbcache": lambda m: DBCache(m, first=1, last=1, threshold=0.6),
    "firstblockcache": lambda m: FirstBlockCache(m, threshold=0.6),
}
ALL: dict[str, Make] = {
    "forecast": lambda m: Forecast(m, order=2, interval=1),
    "fora": lambda m: FORA(m, interval=1),
    "taylorseer": lambda m: TaylorSeer(m, order=2, interval=1),
    "teacache": lambda m: TeaCache(m, STEPS, threshold=0.0),
    "dbcache": lambda m: DBCache(m, first=1, last=1, threshold=0.0),
    "firstblockcache": lambda m: FirstBlockCache(m, threshold=0.0),
}
RULES = {"duca": ["toca", "aggressive"]}  # the kinds of steps that are not full, where they are not named as the method
families = pytest.mark.parametrize("family", FAMILIES)


def _run(reference: Reference, steps: list[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
    return [reference(*inputs) for inputs in steps]


@families
@pytest.mark.parametrize("name", SOME)
def test_full_steps_equal_the_model_and_others_do_not(family: Family, name: str) -> None:
    model = tiny_double(family, depth=3)
    reference = SOME[name](model)
    steps = list(trajectory(2, STEPS))
    with torch.no_grad():
        expected = [prediction(model(*inputs)) for inputs in steps]
    errors = [relative_error(f, e) for f, e in zip(_run(reference, steps), expected, strict=True)]
    assert set(reference.kinds) == {"full", *RULES.get(name, [name])}
    for kind, error in zip(reference.kinds, errors, strict=True):
        assert (error < 1e-6) == (kind == "full"), f"{kind} step, error {error}"


@families
@pytest.mark.parametrize("name", ALL)
def test_nothing_reused_equals_the_model(family: Family, name: str) -> None:
    model = tiny_double(family, depth=3)
    reference = ALL[name](model)
    for inputs in trajectory(2, 4):
        with torch.no_grad():
            expected = prediction(model(*inputs))
        assert relative_error(reference(*inputs), expected) < 1e-6
    assert reference.kinds == ["full"] * 4


@families
def test_toca_that_recomputes_every_token_leaves_only_attention_stale(family: Family) -> None:
    """A ratio of 1 in every layer: the feed-forwards are current, the attention is FORA's."""
    model = tiny_double(family, depth=3)
    toca = ToCa(model, STEPS, fresh_ratio=100.0)

    class StaleAttention(FORA):
        def ffn(self, index: int, inputs: Tensor) -> Tensor:
            self.full, held = True, self.full
            try:
                return super().ffn(index, inputs)
            finally:
                self.full = held

    steps = list(trajectory(2, 3))
    assert toca.schedule[:3] == [True, False, False]
    for found, expected in zip(_run(toca, steps), _run(StaleAttention(model, interval=3), steps), strict=True):
        assert relative_error(found, expected) < 1e-6


@families
@pytest.mark.parametrize("name", ["forecast", "fora", "taylorseer", "toca", "duca"])
def test_a_sample_alone_equals_the_sample_in_a_batch(family: Family, name: str) -> None:
    model = tiny_double(family, depth=2)
    steps = list(trajectory(3, 6))
    together = _run(SOME[name](model), steps)
    alone = _run(SOME[name](model), [(x[1:2], t[1:2], y[1:2]) for x, t, y in steps])
    for both, single in zip(together, alone, strict=True):
        assert relative_error(both[1:2], single) < 1e-6


def test_samples_choose_their_own_tokens() -> None:
    model = tiny_double("dsmoe", depth=2)
    reference = SOME["toca"](model)
    _run(reference, list(trajectory(3, 2)))
    assert isinstance(reference, ToCa)
    ages = reference.ages[0]
    assert ages[0] != ages[1]
    assert [sum(sample) for sample in ages] == [sum(ages[0])] * 3  # as many in each
    assert 0 < sum(ages[0]) < 16
