"""`tune`: the best method for a target, at the output level and at the expert-branch level.

Both levels share the calibrated schedule (`moeca_fx.calibration`). The number of full steps is the one continuous knob:
it is searched for the target; the few other choices of a level are compared at that number.
"""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from moeca_fx.errors import ConfigError, InputError
from moeca_fx.evaluate import psnr
from moeca_fx.policies import Method
from moeca_fx.policies.methods.calibrated import Calibrated
from moeca_fx.provenance import fingerprint
from moeca_fx.transform import transform
from moeca_fx.tuning.candidates import FEWEST_FULL, BranchCandidates, OutputCandidates, fewer_full
from moeca_fx.tuning.target import SLACK, Target, parse_target
from moeca_fx.tuning.trials import Trial, TrialLog

log = logging.getLogger(__name__)
POLISH_TRIES = 30
Sampler = Callable[[Any], Tensor]
Level = Literal["any", "output", "branch"]


@dataclass(frozen=True)
class Tuned:
    """What a search found.

    Attributes:
        method: the best one, for `transform(..., policy=...)` and `policies.save`.
        calibration: its trial on the latents that methods were compared on.
        held_out: the same measured on latents and labels that played no part in the search.
        target: what was asked for.
        met: whether `held_out` is within the target.
        trials: how many methods were tried.
    """

    method: Method
    calibration: Trial
    held_out: Trial
    target: Target
    met: bool
    trials: int


def tune(
    model: nn.Module,
    sampler: Sampler,
    target: Target | str,
    *,
    held_out: Sampler,
    validation: Sampler | None = None,
    level: Level = "any",
    seconds: float = 600.0,
    sampler_name: str = "",
    log_file: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> Tuned:
    """Search a method for one model, one sampler and its number of steps.

    The same arguments give the same result: nothing is drawn at random. Only a budget that runs out makes a difference.

    Args:
        model: the unmodified model.
        sampler: called with a model, returns the images of the calibration latents; the same at every call.
        target: e.g. ``"3x"``, ``"40dB"`` or ``"40dB,500MB"``.
        held_out: the same sampler on other latents and labels; used once, for the report.
        validation: the same on yet others; methods are compared on them. By default on the calibration latents, to
            which weights were fitted: a quality that is just reached there may be missed elsewhere.
        level: which methods to consider.
        seconds: no new trial starts after this time.
        sampler_name: written into the policy, for its reader.
        log_file: finished trials are kept there, and taken from there when the search starts again.
        progress: called with a line of text now and then.

    Raises:
        ConfigError: a wrong target or level, or no method fits into the cache size.
        InputError: the sampler does not repeat itself, or never calls the model.
        MoecaError: as `transform`.
    """
    wanted = parse_target(target) if isinstance(target, str) else target
    if level not in ("any", "output", "branch"):
        raise ConfigError(f"level: expected 'any', 'output' or 'branch', found {level!r}")
    say = progress or (lambda text: log.info("%s", text))
    search = _Search(model, sampler, validation, wanted, time.monotonic() + seconds, log_file, say)
    found = [best for best in search.levels(level, sampler_name) if best is not None]
    if not found:
        steps = search.output.steps
        raise ConfigError(
            f"target {wanted}: no method keeps so little; allow more cache"
            if wanted.cache_bytes is not None
            else f"target {wanted}: out of reach with {steps} steps, of which at least one is full; ask for less"
        )
    method, trial = max(found, key=lambda pair: search.rank(pair[1]))
    say("measuring the best on held-out latents")
    outcome = search.measure(method, held_out, held_out(search.plain))
    met = wanted.met(outcome.speedup, outcome.psnr, outcome.cache_bytes)
    return Tuned(method, trial, outcome, wanted, met, search.count)


class _Search:
    def __init__(
        self,
        model: nn.Module,
        sampler: Sampler,
        validation: Sampler | None,
        target: Target,
        deadline: float,
        log_file: Path | None,
        say: Callable[[str], None],
    ) -> None:
        self.model, self.sampler, self.target, self.deadline, self.say = model, sampler, target, deadline, say
        self.count = 0
        self.example = _first_call(model, sampler)
        say("recording an uncached run")
        self.plain = transform(model, *self.example, policy=None)
        # Expert branches need fewer full steps than the speed-up alone says: half as many at the least.
        fewest = FEWEST_FULL if target.speedup is None else max(FEWEST_FULL, 0.5 / target.speedup)
        self.output = OutputCandidates(model, self.plain, sampler, fewest)
        self.judge = sampler if validation is None else validation
        self.reference = self.output.recording.final if validation is None else validation(self.plain)
        self.trials = TrialLog(log_file, fingerprint(self.output.recording.inputs[0], self.reference))

    def levels(self, level: Level, sampler_name: str) -> Iterator[tuple[Method, Trial] | None]:
        """The best of each level."""
        if level in ("any", "output"):
            self.say("calibrating forecasts of the output")
            yield self._polished(self._best(lambda full: self.output.method(full, sampler_name), self.output.steps))
        if level == "branch" or (level == "any" and time.monotonic() < self.deadline):
            yield self._best_of_branches()

    def _best_of_branches(self) -> tuple[Method, Trial] | None:
        """The number of full steps for the plain variant, then the other variants around it."""
        candidates = BranchCandidates(self.output)
        best = None
        for number, variant in enumerate(candidates.variants()):
            self.say(f"expert branches: variant {number + 1}, {variant}")
            found = self._best(lambda full, chosen=variant: candidates.method(full, chosen), candidates.steps)  # type: ignore[misc]
            if found is not None and (best is None or self.rank(found[1]) > self.rank(best[1])):
                best = found
            if time.monotonic() > self.deadline:
                break
        return best

    def _polished(self, found: tuple[Method, Trial] | None) -> tuple[Method, Trial] | None:
        """Full steps moved one at a time while that brings the images closer; for a quality, with fewer of them too."""
        if found is None or not isinstance(found[0], Calibrated):
            return found
        best, first = found, found[0]
        full = len(first.full)
        while full > 1 and time.monotonic() < self.deadline:
            self.say(f"moving single steps of {full} full ones, {POLISH_TRIES} tries")
            start = first if full == len(first.full) else self.output.method(full, first.sampler)
            method = self.output.polished(start, POLISH_TRIES, self.deadline - time.monotonic())
            polished = (method, self._try(method))
            better = self.rank(polished[1]) > self.rank(best[1])
            best = polished if better else best
            if self.target.speedup is not None or (full < len(first.full) and not better):
                break
            full -= 1  # a quality: moved steps may reach it with fewer
        return best

    def rank(self, trial: Trial) -> tuple[bool, float]:
        """Larger is better: within the target first, then what the target leaves open; outside it, the nearest."""
        if not self.target.met(trial.speedup, trial.psnr, trial.cache_bytes):
            return False, -self.target.shortfall(trial.speedup, trial.psnr, trial.cache_bytes)
        return True, trial.psnr if self.target.speedup is not None else trial.speedup

    def _best(self, make: Callable[[int], Method], steps: int) -> tuple[Method, Trial] | None:
        """The best number of full steps; None where the cache would be too large, or no number can be fast enough."""
        return self._most_full(make, steps) if self.target.speedup is not None else self._fewest_full(make, steps)

    def _most_full(self, make: Callable[[int], Method], steps: int) -> tuple[Method, Trial] | None:
        """The most full steps that reach the speed-up: as many as it allows, then what the last trial says."""
        speedup = self.target.speedup
        assert speedup is not None
        best: tuple[Method, Trial] | None = None
        full = min(steps - 1, int(steps / speedup))
        while full >= 1:
            method = make(full)
            trial = self._try(method)
            if self._too_large(trial):
                return None
            if best is None or self.rank(trial) > self.rank(best[1]):
                best = (method, trial)
            if trial.speedup >= speedup * (1 - SLACK) or full == 1 or time.monotonic() > self.deadline:
                break
            full = max(1, fewer_full(steps, full, trial.speedup, speedup))
        return best

    def _fewest_full(self, make: Callable[[int], Method], steps: int) -> tuple[Method, Trial] | None:
        """The fewest full steps that reach the PSNR, by bisection."""
        low, high = 1, steps - 1
        best: tuple[Method, Trial] | None = None
        while low <= high and (best is None or time.monotonic() <= self.deadline):
            full = (low + high) // 2
            method = make(full)
            trial = self._try(method)
            if self._too_large(trial):
                return None
            if best is None or self.rank(trial) > self.rank(best[1]):
                best = (method, trial)
            good = self.target.psnr is not None and trial.psnr >= self.target.psnr
            low, high = (low, full - 1) if good else (full + 1, high)
        return best

    def _too_large(self, trial: Trial) -> bool:
        return self.target.cache_bytes is not None and trial.cache_bytes > self.target.cache_bytes

    def _try(self, method: Method) -> Trial:
        done = self.trials.get(method)
        if done is None:
            done = self.measure(method, self.judge, self.reference)
            self.trials.add(method, done)
        self.count += 1
        self.say(f"{method.method}: {done.speedup:.2f}x, {done.psnr:.1f} dB, {done.cache_bytes / 1e6:.1f} MB")
        return done

    def measure(self, method: Method, sampler: Sampler, reference: Tensor) -> Trial:
        """One trajectory with the transformed model."""
        fast = self.plain.with_policy(method)
        images = sampler(fast)
        stats = fast.stats()
        return Trial(stats.flops_speedup, psnr(images, reference), fast.memory().total)


class _Called(Exception):
    """Ends a sampler at its first call of the model."""


def _first_call(model: nn.Module, sampler: Sampler) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the sampler calls the model with."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def listening(*args: Any, **kwargs: Any) -> Any:
        seen.append((args, kwargs))
        raise _Called

    try:
        sampler(listening)
    except _Called:
        return seen[0]
    raise InputError(f"tune: the sampler returned without calling {type(model).__name__}; pass a function that runs it")
