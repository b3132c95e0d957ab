"""Warnings about trajectories that do not do what their policy was chosen for, each given once."""

import sys
import warnings
from collections.abc import Sequence

from moeca_fx.policies.policy import Policy
from moeca_fx.policies.schedule import Cycle
from moeca_fx.runtime.session import Ended
from moeca_fx.runtime.trajectory import STOOD_STILL, Trajectory


class NothingReusedWarning(UserWarning):
    """A run in which no branch was reused: it cost as much as the uncached model."""


class CacheLimitWarning(UserWarning):
    """A call with more samples than its cache may hold: the rest is computed in full at every step."""


class OtherLengthWarning(UserWarning):
    """A trajectory of another length than the policy was made for."""


def _levels_to_the_caller() -> int:
    """`stacklevel` of the first frame outside this package and what runs it, for a warning raised by the caller."""
    level, frame = 1, sys._getframe(1)
    between = ("moeca_fx.", "torch.", "diffusers.", "contextlib")
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith(between):
        level, frame = level + 1, frame.f_back
    return level


class Advice:
    """Gives each kind of warning once.

    Attributes:
        policy: of the transformed model; None caches nothing.
        given: kinds that were given.
    """

    def __init__(self, policy: Policy | None) -> None:
        self.policy = policy
        self.given: set[str] = set()

    def nothing_reused(self, trajectory: Trajectory, reason: str) -> None:
        """Say once when a finished trajectory reused nothing."""
        self._say_nothing_reused(Ended(trajectory.step, self.why_nothing_reused(trajectory, reason)))

    def session_over(self, ended: Sequence[Ended]) -> None:
        """Say once when no trajectory of a session reused anything, or the longest had another length than it should.

        Others may be short for good reason: guidance that is switched off late in a run.
        """
        if not ended:
            return
        longest = max(ended, key=lambda trajectory: trajectory.steps)
        if all(trajectory.why is not None for trajectory in ended):
            self._say_nothing_reused(longest)
        self.other_length(longest.steps, over=True)

    def _say_nothing_reused(self, ended: Ended) -> None:
        if ended.why is not None and "nothing reused" not in self.given:
            self.given.add("nothing reused")
            message = f"moeca_fx: a run of {ended.steps} steps reused nothing: {ended.why}"
            warnings.warn(message, NothingReusedWarning, _levels_to_the_caller())

    def other_length(self, steps: int, over: bool) -> None:
        """Say once when a schedule was made for trajectories of another length than these `steps`."""
        assert self.policy is not None
        length = self.policy.schedule.length
        if length is None or steps < 2 or "length" in self.given:
            return
        if steps < length if over else steps == length:
            self.given.add("length")
            found = f"ended after {steps}" if over else f"goes on after {length}"
            warnings.warn(
                f"moeca_fx: the policy was made for trajectories of {length} steps, this one {found}; its full steps "
                "fall elsewhere than intended: run that many, or tune a policy for yours",
                OtherLengthWarning,
                _levels_to_the_caller(),
            )

    def why_nothing_reused(self, trajectory: Trajectory, reason: str) -> str | None:
        """Why a trajectory reused nothing, which ended for `reason`; None when it reused something."""
        assert self.policy is not None
        if trajectory.cached_steps == 0:
            schedule = self.policy.schedule
            if isinstance(schedule, Cycle) and schedule.interval == 1:
                return "interval=1 makes every step full"
            advice = (
                "; if the sampler calls the model twice a step (guidance), wrap each call in "
                "`with model.context('cond'):` and `with model.context('uncond'):`, else every step runs in full"
            )
            if trajectory.paired:
                return f"every timestep came twice in one context{advice}"
            if 1 < trajectory.step <= schedule.settles:
                return f"it was over before {schedule} skips a step"
            if trajectory.step > 1:
                return f"the schedule {schedule} made every step full; lower its threshold's caution or choose another"
            if trajectory.announced:
                return f"it had one call: {reason}"
            return f"it had one call before a new trajectory began, because {reason}" + advice * (reason == STOOD_STILL)
        if trajectory.routed_steps and trajectory.branches() == trajectory.recomputed_branches():
            steps = trajectory.routed_steps
            return f"every branch was recomputed on all {steps} cached steps; raise tau0 or lower lambda1"
        return None

    def cache_limit(self, batch: int, most: int, size: int) -> None:
        """Say once that a call has more samples than may have caches.

        Args:
            batch: samples of the call; most: those that have caches.
            size: bytes of cache of all of them.
        """
        if "cache limit" in self.given:
            return
        self.given.add("cache limit")
        warnings.warn(
            f"moeca_fx: the cache of {batch} samples takes {size / 1e6:.1f} MB and cache_limit holds {most} samples; "
            f"the other {batch - most} are computed in full at every step: sample batches of at most {most}, or store "
            "the cache in fewer bits (cache_dtype)",
            CacheLimitWarning,
            _levels_to_the_caller(),
        )
