"""Methods to try: calibrated forecasts of the output, and of expert branches on the same schedule."""

import math
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from moeca_fx.calibration import (
    Calibration,
    best_schedule,
    calibrate,
    find_law,
    fit_weights,
    gap_costs,
    image_metric,
    polish,
    record,
)
from moeca_fx.calibration.schedule_search import longest_gap
from moeca_fx.policies.methods.branch_forecast import BranchForecast
from moeca_fx.policies.methods.calibrated import Calibrated

# Unless a search knows better, costs of gaps are computed once for at least this share of full steps.
FEWEST_FULL = 0.1


class OutputCandidates:
    """Calibrations of one recorded run; schedule and weights for any number of full steps.

    Args:
        model: the unmodified model, for its Jacobian.
        plain: a faster one that computes the same.
        fewest: share of full steps down to which one table of gaps serves; a smaller share costs more time at once.
    """

    def __init__(
        self, model: nn.Module, plain: nn.Module, sampler: Callable[[Any], Tensor], fewest: float = FEWEST_FULL
    ) -> None:
        self.sampler, self.plain = sampler, plain
        self.recording = record(sampler, plain)
        self.steps, self.fewest = self.recording.steps, fewest
        self.law = find_law(sampler, self.recording)
        self.metric = image_metric(self.recording, self.law, model)

    @lru_cache(maxsize=4)  # noqa: B019  # one object lives as long as a search
    def costs(self, reach: int, inputs: bool) -> Tensor:
        """Costs of gaps up to `reach`."""
        return gap_costs(self.recording, self.law, self.metric, inputs, reach)

    def reach(self, full: int) -> int:
        """A reach that serves many numbers of full steps, so that costs are computed once or twice."""
        fewest = int(self.steps * self.fewest)
        return longest_gap(self.steps, max(1, min(full, fewest)))

    def method(self, full: int, sampler_name: str, inputs: bool = True, order: int = 1) -> Calibrated:
        """The calibration with `full` full steps."""
        found = calibrate(
            self.recording,
            self.sampler,
            self.plain,
            full,
            law=self.law,
            metric=self.metric,
            costs=self.costs(self.reach(full), inputs),
            order=order,
            inputs=inputs,
        )
        return _as_method(found, sampler_name)

    def polished(
        self,
        method: Calibrated,
        tries: int,
        seconds: float = math.inf,
        losses: MutableMapping[tuple[int, ...], float] | None = None,
    ) -> Calibrated:
        """`method` with its full steps moved one at a time wherever that brings the images closer; see `polish`.

        Args:
            method: of this object, order 1.
            tries: moves that are tried.
            seconds: no further try starts after this time.
            losses: see `polish`.
        """

        def fit(full: tuple[int, ...]) -> Calibration:
            return fit_weights(
                self.recording, self.sampler, self.plain, full, law=self.law, metric=self.metric, inputs=method.inputs
            )

        start = Calibration(self.steps, method.full, dict(method.weights), 1, method.inputs)
        found = polish(
            start, fit, self.recording, self.sampler, self.plain, seconds=seconds, tries=tries, losses=losses
        )
        return _as_method(found, method.sampler)

    def schedule(self, full: int) -> tuple[int, ...]:
        """The best `full` steps for an order-1 forecast without inputs, which features in the network are."""
        return best_schedule(self.costs(self.reach(full), inputs=False), full)


def _as_method(found: Calibration, sampler_name: str) -> Calibrated:
    return Calibrated(found.steps, found.full, tuple(sorted(found.weights.items())), found.inputs, sampler_name)


@dataclass(frozen=True)
class BranchVariant:
    """Choices at the branch level."""

    order: int
    margin: float | None

    def __str__(self) -> str:
        return f"order {self.order}, margin {self.margin}"


class BranchCandidates:
    """MoECa's branches, forecast, on the calibrated schedule; the sampler's name goes into the policy."""

    def __init__(self, output: OutputCandidates, sampler_name: str = "") -> None:
        self.output, self.steps, self.sampler_name = output, output.steps, sampler_name

    def variants(self) -> tuple[BranchVariant, ...]:
        """The most promising first."""
        return (BranchVariant(1, 0.05), BranchVariant(1, None), BranchVariant(1, 0.2), BranchVariant(2, 0.05))

    def method(self, full: int, variant: BranchVariant) -> BranchForecast:
        """The variant with `full` full steps."""
        return BranchForecast(
            order=variant.order,
            steps=self.steps,
            full=self.output.schedule(full),
            sampler=self.sampler_name,
            margin=variant.margin,
        )


def fewer_full(steps: int, full: int, speedup: float, target: float) -> int:
    """How many full steps should reach the speed-up `target`, after `full` of `steps` gave only `speedup`.

    A step that is not full costs nearly the same share c of a full one at every number of them:
    ``steps / speedup = full + c (steps - full)`` gives c, and the same with `target` the number. May be below 1.
    """
    cost = (steps / speedup - full) / (steps - full)
    return min(full - 1, int(steps * (1 / target - cost) / (1 - cost)))
