"""Run a reference and the product side by side over a trajectory and compare them after every step."""

from collections.abc import Callable, Sequence
from functools import cache

from torch import Tensor

import moeca_fx
from moeca_fx.policies import Method
from moeca_fx.runtime.module import TransformedModel
from moeca_fx.runtime.runtime import DEFAULT_CONTEXT
from moeca_fx.zoo import DiTMoE, DSMoE
from tests.helpers.zoo_models import Family, Inputs, prediction
from tests.policies.peers.cases import tiny_double, trajectory
from tests.reference.peers import Reference

TOLERANCE = 1e-5  # of the largest expected value: scores and routers are fp32 in the product, the rest is fp64 here
MARGIN = 1e-5  # decisions nearer to a tie may fall otherwise in fp32


@cache
def _traced(family: Family, depth: int) -> tuple[DSMoE | DiTMoE, TransformedModel]:
    model = tiny_double(family, depth)
    example = next(iter(trajectory()))
    return model, moeca_fx.transform(model, example, policy=None)


def compare(
    family: Family,
    method: Method,
    make: Callable[[DSMoE | DiTMoE], Reference],
    steps: Sequence[Inputs],
    depth: int = 2,
    tolerance: float = TOLERANCE,
) -> Reference:
    """Assert equal predictions and equal kinds at every step of a trajectory.

    What the product was given and what it returned is overwritten after every step: no cache may live in either.

    Args:
        family: of the model, `tiny_double`.
        method: for `TransformedModel.with_policy`; each family is traced once a session.
        make: the reference for the same model.
        steps: (x, t, y) of every step.
        depth: number of blocks.
        tolerance: largest difference allowed, of the largest expected value.

    Returns:
        The reference after its last step.
    """
    model, plain = _traced(family, depth)
    transformed, reference = plain.with_policy(method), make(model)
    for j, (x, t, y) in enumerate(steps):
        given = x.clone()
        found = prediction(transformed(given, t, y))
        expected = reference(x, t, y)
        kind = reference.kinds[-1]
        where = f"{method} on {family}, step {j} ({kind})"
        full = j in transformed._moeca.trajectories[DEFAULT_CONTEXT].full_steps
        assert full == (kind == "full"), f"{where}: the product made it {'full' if full else 'cached'}"
        _assert_close(found, expected, tolerance, where)
        found.zero_()
        given.zero_()
    assert reference.margin > MARGIN, f"a decision is {reference.margin:.1e} from a tie: use another seed"
    return reference


def _assert_close(found: Tensor, expected: Tensor, tolerance: float, where: str) -> None:
    assert found.shape == expected.shape, where
    error = float((found.double() - expected).abs().max() / expected.abs().max())
    assert error <= tolerance, f"{where}: relative difference {error:.2e}, allowed {tolerance:.0e}"
