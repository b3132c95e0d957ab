"""Methods to try: calibrated forecasts of the output, and of expert branches on the same schedule."""

import math
import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

from torch import Tensor, nn

from moeca_fx.calibration import (
    Calibration,
    Metric,
    Replay,
    best_schedule,
    calibrate,
    find_law,
    fit_weights,
    gap_costs,
    image_metric,
    polish,
    record,
)
from moeca_fx.calibration.metric import PLAIN_SHARE
from moeca_fx.calibration.polish import image_loss
from moeca_fx.calibration.schedule_search import longest_gap
from moeca_fx.policies.methods.branch_forecast import BranchForecast
from moeca_fx.policies.methods.calibrated import Calibrated

# Weights of the plain error beside the projected one: almost none, and almost nothing else.
PLAIN_SHARES = (PLAIN_SHARE, 10.0)
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
    def costs(self, reach: int, inputs: bool, plain_share: float = PLAIN_SHARE) -> Tensor:
        """Costs of gaps up to `reach`, with this weight of the plain error (`Metric`)."""
        return gap_costs(self.recording, self.law, self._metric(plain_share), inputs, reach)

    def _metric(self, plain_share: float) -> Metric:
        return replace(self.metric, plain_share=plain_share)

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
        losses: Callable[[float], MutableMapping[tuple[int, ...], float]] | None = None,
    ) -> Calibrated:
        """The best of several starts with as many full steps, its steps then moved one at a time; see `polish`.

        The starts are the schedule of `method`, the one that a metric of mostly the plain error finds, and even steps,
        each with weights fitted under both metrics. Far from the recorded run, as in long gaps of a stochastic sampler,
        the linear estimate of what an error does to the image misleads; the images themselves decide.

        Args:
            method: of this object, order 1.
            tries: moves that are tried.
            seconds: no further start or try begins after this time.
            losses: what is known of schedules, by the weight of the plain error; see `polish`.
        """
        deadline = time.monotonic() + seconds
        memory = losses or (lambda _: {})
        known = {share: memory(share) for share in PLAIN_SHARES}
        full = len(method.full)
        plain = best_schedule(self.costs(self.reach(full), method.inputs, PLAIN_SHARES[-1]), full)
        even = tuple(index * self.steps // full for index in range(full))
        best: tuple[float, float, Calibration] | None = None
        for share in PLAIN_SHARES:
            for start in dict.fromkeys((method.full, plain, even)):
                if best is not None and time.monotonic() >= deadline:
                    break
                loss = known[share].get(start)
                if best is not None and loss is not None and loss >= best[0]:
                    continue
                fitted = self._fit(start, method.inputs, share)
                if loss is None:
                    loss = image_loss(self.sampler(Replay(self.plain, fitted)), self.recording.final)
                    known[share][start] = loss
                if best is None or loss < best[0]:
                    best = loss, share, fitted
        assert best is not None
        _, share, begin = best
        left = max(0.0, deadline - time.monotonic())
        fit = partial(self._fit, inputs=method.inputs, plain_share=share)
        found = polish(
            begin, fit, self.recording, self.sampler, self.plain, seconds=left, tries=tries, losses=known[share]
        )
        return _as_method(found, method.sampler)

    def _fit(self, full: tuple[int, ...], inputs: bool, plain_share: float) -> Calibration:
        metric = self._metric(plain_share)
        return fit_weights(self.recording, self.sampler, self.plain, full, law=self.law, metric=metric, inputs=inputs)

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
