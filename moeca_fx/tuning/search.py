"""`tune`: the best method for a target, at the output level and at the expert-branch level.

Both levels share the calibrated schedule (`moeca_fx.calibration`). The number of full steps is the one continuous knob:
it is searched for the target; the few other choices of a level are compared at that number.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from moeca_fx.calibration.record import OneCallAStep
from moeca_fx.errors import ConfigError, InputError, require
from moeca_fx.evaluate import psnr
from moeca_fx.policies import Method
from moeca_fx.policies.methods.calibrated import Calibrated
from moeca_fx.provenance import fingerprint
from moeca_fx.transform import transform
from moeca_fx.tuning.candidates import FEWEST_FULL, BranchCandidates, OutputCandidates, fewer_full
from moeca_fx.tuning.target import SLACK, Target, parse_target
from moeca_fx.tuning.trials import Trial, TrialLog, check_log

log = logging.getLogger(__name__)
POLISH_TRIES = 30
Sampler = Callable[[Any], Tensor]
Level = Literal["any", "output", "branch"]


@dataclass(frozen=True)
class Tuned:
    """What a search found; the nearest to the target where nothing was within it.

    Attributes:
        method: the best one, for `transform(..., policy=...)` and `policies.save`.
        calibration: its trial on the latents that methods were compared on.
        held_out: the same measured on latents and labels that played no part in the search; None without such.
        target: what was asked for.
        met: whether `held_out`, or without it `calibration`, is within the target.
        trials: how many methods were tried.
    """

    method: Method
    calibration: Trial
    held_out: Trial | None
    target: Target
    met: bool
    trials: int


def tune(
    model: nn.Module,
    sampler: Sampler,
    target: Target | str,
    *,
    held_out: Sampler | None = None,
    validation: Sampler | None = None,
    level: Level = "any",
    seconds: float = 600.0,
    sampler_name: str = "",
    log_file: str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Tuned:
    """Search a method for one model, one sampler and its number of steps.

    The same arguments give the same result: nothing is drawn at random. Only a budget that runs out makes a difference.

    Args:
        model: the unmodified model.
        sampler: called with a model, returns the images of the calibration latents; the same at every call.
        target: e.g. ``"3x"``, ``"40dB"``, ``"40dB,500MB"``, or ``"500MB"`` at 3x fewer FLOPs.
        held_out: the same sampler on other latents and labels; used once, for the report. Without it the report is of
            the latents that methods were compared on, which flatters.
        validation: the same on yet others; methods are compared on them. By default on the calibration latents, to
            which weights were fitted: a quality that is just reached there may be missed elsewhere.
        level: which methods to consider.
        seconds: no new trial starts after this time.
        sampler_name: written into the policy, for its reader.
        log_file: finished trials are kept there, and taken from there when the search starts again.
        progress: called with a line of text now and then.

    Raises:
        ConfigError: a wrong target or level, or `log_file` holds something else.
        InputError: the sampler does not repeat itself, or never calls the model.
        MissingExtraError: torchmetrics, which measures, is not installed.
        MoecaError: as `transform`.
    """
    wanted = parse_target(target) if isinstance(target, str) else target
    if level not in ("any", "output", "branch"):
        raise ConfigError(f"level: expected 'any', 'output' or 'branch', found {level!r}")
    require("torchmetrics", "demo")
    log_path = None if log_file is None else Path(log_file)
    if log_path is not None:
        check_log(log_path)
    say = progress or (lambda text: log.info("%s", text))
    search = _Search(model, sampler, validation, wanted, time.monotonic() + seconds, log_path, say)
    method, trial = max(search.levels(level, sampler_name), key=lambda pair: search.rank(pair[1]))
    outcome = None
    if held_out is not None:
        say("measuring the best on held-out latents")
        outcome = search.measure(method, held_out, held_out(search.plain))
    reported = outcome or trial
    met = wanted.met(reported.speedup, reported.psnr, reported.cache_bytes)
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
        self.plain = transform(model, *self.example, policy=None, compile=False)
        # Expert branches need fewer full steps than the speed-up alone says: half as many at the least.
        fewest = FEWEST_FULL if target.speedup is None else max(FEWEST_FULL, 0.5 / target.speedup)
        self.output = OutputCandidates(model, self.plain, sampler, fewest)
        self.judge = sampler if validation is None else validation
        self.reference = self.output.recording.final if validation is None else validation(self.plain)
        self.trials = TrialLog(log_file, fingerprint(self.output.recording.inputs[0], self.reference))

    def levels(self, level: Level, sampler_name: str) -> Iterator[tuple[Method, Trial]]:
        """The best of each level."""
        if level in ("any", "output"):
            self.say("calibrating forecasts of the output")
            yield self._polished(self._best(lambda full: self.output.method(full, sampler_name), self.output.steps))
        if level == "branch" or (level == "any" and time.monotonic() < self.deadline):
            yield self._best_of_branches(sampler_name)

    def _best_of_branches(self, sampler_name: str) -> tuple[Method, Trial]:
        """The best of the variants, each with its own number of full steps."""
        candidates = BranchCandidates(self.output, sampler_name)
        found = []
        for number, variant in enumerate(candidates.variants()):
            self.say(f"expert branches: variant {number + 1}, {variant}")
            found.append(self._best(lambda full, chosen=variant: candidates.method(full, chosen), candidates.steps))  # type: ignore[misc]
            if time.monotonic() > self.deadline:
                break
        return max(found, key=lambda pair: self.rank(pair[1]))

    def _polished(self, found: tuple[Method, Trial]) -> tuple[Method, Trial]:
        """Full steps moved one at a time while that brings the images closer; for a quality, with fewer of them too."""
        if not isinstance(found[0], Calibrated):
            return found
        best, first = found, found[0]
        full = len(first.full)
        while full > 1 and time.monotonic() < self.deadline:
            self.say(f"moving single steps of {full} full ones, {POLISH_TRIES} tries")
            start = first if full == len(first.full) else self.output.method(full, first.sampler)
            seconds = self.deadline - time.monotonic()
            method = self.output.polished(start, POLISH_TRIES, seconds, self.trials.losses)
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

    def _best(self, make: Callable[[int], Method], steps: int) -> tuple[Method, Trial]:
        """The best number of full steps; the nearest to the target where none is within it."""
        tried: list[tuple[Method, Trial]] = []

        def attempt(full: int) -> Trial | None:
            """None when the search should end here."""
            method = make(full)
            trial = self._try(method)
            tried.append((method, trial))
            too_large = self.target.cache_bytes is not None and trial.cache_bytes > self.target.cache_bytes
            return None if too_large or time.monotonic() > self.deadline else trial

        (self._most_full if self.target.speedup is not None else self._fewest_full)(attempt, steps)
        return max(tried, key=lambda pair: self.rank(pair[1]))

    def _most_full(self, attempt: Callable[[int], Trial | None], steps: int) -> None:
        """As many full steps as the speed-up allows, then as the last trial says, until it is reached."""
        speedup = self.target.speedup
        assert speedup is not None
        full = max(1, min(steps - 1, int(steps / speedup)))
        while (trial := attempt(full)) is not None and trial.speedup < speedup * (1 - SLACK) and full > 1:
            full = max(1, fewer_full(steps, full, trial.speedup, speedup))

    def _fewest_full(self, attempt: Callable[[int], Trial | None], steps: int) -> None:
        """The fewest full steps that reach the PSNR, by bisection."""
        low, high = 1, steps - 1
        while low <= high and (trial := attempt(full := (low + high) // 2)) is not None:
            good = self.target.psnr is not None and trial.psnr >= self.target.psnr
            low, high = (low, full - 1) if good else (full + 1, high)

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
        sampler(OneCallAStep(listening))
    except _Called:
        return seen[0]
    raise InputError(f"tune: the sampler returned without calling {type(model).__name__}; pass a function that runs it")
