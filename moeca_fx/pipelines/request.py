"""Requests: every `pipe(...)` of a pipeline with a policy.

    pipe.__class__     DiTPipeline  -->  a subclass of the same name, whose `__call__` is a request

A request begins new trajectories; the scheduler's `step` says when a denoising step is over, so that several calls a
step (separate guidance) and several evaluations a step (Heun) are what they are; the end, by an exception too, frees
the caches and tells the logger ``moeca_fx.pipeline`` what was saved.
"""

import functools
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from moeca_fx.errors import ConfigError
from moeca_fx.pipelines.checks import check_denoiser
from moeca_fx.pipelines.denoiser import Denoiser, Run
from moeca_fx.pipelines.schedulers import is_scheduler, unwatch, watch
from moeca_fx.pipelines.stand_in import new_object, stand_in
from moeca_fx.runtime.accounting import Accounting
from moeca_fx.runtime.lock import TRACING
from moeca_fx.runtime.module import TransformedModel
from moeca_fx.runtime.statistics import Statistics

log = logging.getLogger("moeca_fx.pipeline")
PLACE = "_moeca_application"
"""Where a pipeline keeps its application."""


class Application:
    """A policy on a pipeline.

    Attributes:
        pipe, original, name: the pipeline, its own class, and which component is swapped.
        found: what that was; shown: the stand-in for it.
        requests: how many began.
    """

    def __init__(self, pipe: Any, name: str, found: nn.Module, denoiser: Denoiser) -> None:
        self.pipe = pipe
        self.original: Any = type(pipe)
        self.name = name
        self.found = found
        self.denoiser = denoiser
        self.shown = stand_in(denoiser)
        self.requests = 0
        self._watching: list[tuple[Any, Run]] = []

    @contextmanager
    def request(self) -> Iterator[None]:
        """One `pipe(...)`."""
        self._check()
        self.requests += 1
        number, before = self.requests, self._counts()
        with self.denoiser.run() as run, ExitStack() as stack:
            for value in list(vars(self.pipe).values()):
                self.watch(value, run)
            stack.callback(self._unwatch, run)
            yield
            run.quiet = bool(vars(self.pipe).get("_interrupt"))  # diffusers' flag: the user stopped it
        self._log(number, run, before)

    def watch(self, value: Any, run: Run | None = None) -> None:
        """Hear the steps of a scheduler that the pipeline holds or, in a request, is given."""
        run = run or self.denoiser.current
        if run is None or not is_scheduler(value) or any(item is value and by is run for item, by in self._watching):
            return
        watch(value, run)
        self._watching.append((value, run))

    def _unwatch(self, run: Run) -> None:
        for scheduler, by in self._watching:
            if by is run:
                unwatch(scheduler, run)
        self._watching = [(scheduler, by) for scheduler, by in self._watching if by is not run]

    def _check(self) -> None:
        if vars(self.pipe)[self.name] is not self.shown:
            raise ConfigError(
                f"{type(self.pipe).__name__}.{self.name} was replaced since apply, so no policy would act on it; call "
                "moeca_fx.remove(pipe), which keeps the new one, and moeca_fx.apply(pipe, ...) again"
            )
        with TRACING:  # of another pipeline that shares the model
            check_denoiser(self.pipe, self.name, self.denoiser.model)

    def _counts(self) -> tuple[TransformedModel, Statistics] | None:
        """Totals before a request, and whose they are; None when they are zero, or nobody reads the log."""
        fast = self.denoiser.fast
        return None if fast is None or not log.isEnabledFor(logging.INFO) else (fast, totals(fast))

    def _log(self, number: int, run: Run, before: tuple[TransformedModel, Statistics] | None) -> None:
        if run.fast is None or not log.isEnabledFor(logging.INFO):
            return
        start = before[1] if before is not None and before[0] is run.fast else Accounting().statistics()
        line = summary(start, totals(run.fast), type(self.denoiser.model).__name__)
        log.info("%s: request %d: %d steps, %s", type(self.pipe).__name__, number, run.steps, line)


def totals(fast: TransformedModel) -> Statistics:
    """What a model did so far."""
    return fast._moeca.accounting.statistics()


def summary(start: Statistics, end: Statistics, model: str) -> str:
    """What happened in between, in one line."""
    full, reused = end.full_steps - start.full_steps, end.cached_steps - start.cached_steps
    executed, uncached = end.flops_executed - start.flops_executed, end.flops_uncached - start.flops_uncached
    saved = 1 - executed / uncached if uncached else 0.0
    return (
        f"{full + reused} calls of {model}, {full} in full and {reused} with reuse; "
        f"{executed:.2e} of {uncached:.2e} FLOPs, {saved:.1%} saved"
    )


class Applied:
    """Mixed into a subclass of the pipeline's class."""


def applied_class(original: Any) -> Any:
    """A subclass that a pipeline's users cannot tell from its class, but whose calls are requests."""

    @functools.wraps(original.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with vars(self)[PLACE].request():
            return original.__call__(self, *args, **kwargs)

    def set_attribute(self: Any, name: str, value: Any) -> None:
        original.__setattr__(self, name, value)
        vars(self)[PLACE].watch(value)

    def reduce(self: Any, protocol: Any) -> Any:
        """A copy, or what is pickled, is the pipeline without the policy."""
        application = vars(self)[PLACE]
        state = {key: value for key, value in vars(self).items() if key != PLACE}
        if state[application.name] is application.shown:
            state[application.name] = application.found
        return new_object, (original,), state

    content = {key: getattr(original, key) for key in ("__module__", "__qualname__", "__doc__")}
    content |= {"__call__": call, "__setattr__": set_attribute, "__reduce_ex__": reduce}
    return type(original.__name__, (Applied, original), content)
