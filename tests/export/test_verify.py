"""verify: an artefact that computes something else is found, a tie is told from an error."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from moeca_fx import MoECa
from moeca_fx.export.plan import build_plan
from moeca_fx.export.verify import Verification, verify
from moeca_fx.runtime.module import TransformedModel
from tests.helpers.transformed import toy_pair

POLICY = MoECa(interval=3, tau0=0.6)
SIZES = (1, 2, 5)


class _Echo:
    """Stands for an artefact: the transformed model under a second runtime, its results and caches changed."""

    def __init__(self, fast: TransformedModel, shift: float = 0.0, tied_samples: int = 0) -> None:
        self.inner = fast.with_policy(POLICY)
        self.shift, self.tied = shift, tied_samples
        self.manifest = SimpleNamespace(cached=True)

    def __call__(self, *args: Tensor) -> Tensor:
        result: Tensor = self.inner(*args).clone()
        result[: self.tied] += 0.5  # what a tie leads to
        return result * (1 + self.shift)

    def cache(self) -> dict[str, Tensor]:
        cache = {name: value.clone() for name, value in self.inner.cache().items()}
        for name in cache:
            if name.endswith(".norm"):
                cache[name][: self.tied, 0] += 1.0
            if name.endswith(".expert"):
                cache[name][: self.tied, 0] += 1
        return cache

    def reset(self) -> None:
        self.inner.reset()

    def reset_stats(self) -> None:
        self.inner.reset_stats()


@pytest.fixture
def fast() -> TransformedModel:
    return toy_pair(POLICY)[1]


def _verify(fast: TransformedModel, **changes: float) -> Verification:
    return verify(_Echo(fast, **changes), fast, build_plan(fast), SIZES)  # type: ignore[arg-type]  # see _Echo


def test_the_same_passes(fast: TransformedModel) -> None:
    found = _verify(fast)
    assert found == Verification(0.0, 0.0, 1.0, 12) and found.passed


def test_another_result_fails(fast: TransformedModel) -> None:
    found = _verify(fast, shift=0.001)
    assert not found.passed and found.error == pytest.approx(0.001, rel=0.05)


def test_a_result_that_differs_where_a_tie_is_seen_is_not_an_error_but_counted(fast: TransformedModel) -> None:
    found = _verify(fast, tied_samples=1)
    assert found.error == 0.0 and found.tied == pytest.approx(1 / 6)  # one of six tokens at batch 1
    assert found.agreeing == pytest.approx(6 / 18)
    assert not found.passed  # far too many


@pytest.mark.parametrize(
    ("found", "passed"),
    [
        (Verification(1e-5, 0.001, 0.9, 12), True),
        (Verification(2e-4, 0.0, 1.0, 12), False),
        (Verification(0.0, 0.03, 0.9, 12), False),
        (Verification(0.0, 0.001, 0.4, 12), False),
    ],
)
def test_bounds(found: Verification, passed: bool) -> None:
    assert found.passed == passed


def test_examples_of_any_batch(fast: TransformedModel) -> None:
    plan = build_plan(fast)
    assert [tuple(value.shape) for value in plan.call(4)] == [(4, 6, 16), (4,)]
    (graph,) = plan.graphs
    assert [tuple(value.shape) for value in graph.examples] == [tuple(port.sized(2)) for port in graph.inputs]
    assert torch.equal(graph.examples[-1], torch.tensor(1))
