"""`apply` and `remove`: a policy on a diffusers pipeline, in one line, and off again.

    pipe.__class__     DiTPipeline  -->  a subclass of the same name: every `pipe(...)` is a request
    pipe.transformer   the model    -->  its stand-in (see `denoiser`)

A request begins new trajectories; the scheduler's `step` says when a denoising step is over, so that several calls a
step (separate guidance) and several evaluations a step (Heun) are what they are; the end, by an exception too, frees
the caches.
"""

import functools
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from os import PathLike
from typing import Any, TypeVar

from torch import nn

from moeca_fx.errors import ConfigError
from moeca_fx.graph.storage import CacheDtype
from moeca_fx.model_checks import resolve_policy
from moeca_fx.pipelines.checks import check_denoiser, check_pipeline, check_scheduler, find_denoiser
from moeca_fx.pipelines.denoiser import Denoiser, Run, StandIn, new_object, stand_in
from moeca_fx.pipelines.schedulers import is_scheduler, unwatch, watch
from moeca_fx.policies import Method, MoECa, Policy
from moeca_fx.runtime.accounting import Accounting
from moeca_fx.runtime.module import TransformedModel
from moeca_fx.runtime.options import memory_options
from moeca_fx.runtime.statistics import Statistics
from moeca_fx.transform import Settings

log = logging.getLogger("moeca_fx.pipeline")
Pipeline = TypeVar("Pipeline")
_DEFAULT = MoECa()
_PLACE = "_moeca_application"


def apply(
    pipe: Pipeline,
    policy: Method | Policy | str | PathLike[str] | None = _DEFAULT,
    *,
    denoiser: str | None = None,
    compile: bool = True,
    cache_dtype: CacheDtype | None = None,
    cache_limit: int | str | None = None,
    chunk: int | None = None,
) -> Pipeline:
    """Make a diffusers pipeline reuse expert branches: its denoiser is transformed at its first call.

    Args:
        pipe: any `DiffusionPipeline` whose denoiser is a mixture of experts. It is changed, and stays of its class.
        policy: as for `moeca_fx.transform`; None vectorises the experts and caches nothing.
        denoiser: name of the component to transform; by default ``transformer``, else ``unet``.
        compile, cache_dtype, cache_limit, chunk: as for `moeca_fx.transform`.

    Returns:
        `pipe`.

    Raises:
        ConfigError: not a pipeline, one that a policy is applied to already, one without a scheduler or such a
            component, or an option out of range.
        UnsupportedModelError: the denoiser is offloaded, hooked, compiled, in training mode or quantised.
        MissingExtraError: diffusers is not installed.

    The first request raises, in its first call of the denoiser, what `moeca_fx.transform` raises: `NoMoEFoundError` for
    a dense one. `remove` then gives the pipeline back.
    """
    check_pipeline(pipe)
    if _PLACE in vars(pipe):
        raise ConfigError(
            f"{type(pipe).__name__}: a policy is applied to this pipeline already; call moeca_fx.remove(pipe) first"
        )
    parts = None if policy is None else resolve_policy(policy)
    settings = Settings(parts, memory_options(cache_dtype, cache_limit, chunk), compile, announced=True)
    check_scheduler(pipe)
    name = find_denoiser(pipe, denoiser)
    found: nn.Module = getattr(pipe, name)
    model = found._moeca_denoiser.model if isinstance(found, StandIn) else found  # shared with another pipeline
    check_denoiser(pipe, name, model)
    application = Application(pipe, name, found, Denoiser(model, settings))
    vars(pipe)[_PLACE] = application
    vars(pipe)[name] = application.shown
    pipe.__class__ = _applied_class(type(pipe))
    return pipe


def remove(pipe: Pipeline) -> Pipeline:
    """Undo `apply`: the pipeline, its class and its denoiser are what they were, and caches and graphs are freed.

    A component that was put in the denoiser's place since stays.

    Returns:
        `pipe`.

    Raises:
        ConfigError: no policy is applied to it, or a request is running.
    """
    application = _application(pipe, "remove")
    if application.denoiser.running:
        raise ConfigError(f"{type(pipe).__name__}: remove was called within a request; call it after pipe(...)")
    pipe.__class__ = application.original
    del vars(pipe)[_PLACE]
    if vars(pipe)[application.name] is application.shown:
        vars(pipe)[application.name] = application.found
    application.denoiser.removed, application.denoiser.fast = True, None
    return pipe


def stats(pipe: object) -> Statistics:
    """What a pipeline executed and reused since `apply`, or since its denoiser moved or changed; zeros before a request.

    Raises:
        ConfigError: no policy is applied to it.
    """
    fast = _application(pipe, "stats").denoiser.fast
    return Accounting().statistics() if fast is None else fast.stats()


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
        run = run or self.denoiser._run.get()
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
        f"{full + reused} calls of {model}: {full} full, {reused} reused branches; "
        f"{executed:.2e} of {uncached:.2e} FLOPs, {saved:.1%} saved"
    )


class Applied:
    """Mixed into a subclass of the pipeline's class."""


def _applied_class(original: Any) -> Any:
    @functools.wraps(original.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with vars(self)[_PLACE].request():
            return original.__call__(self, *args, **kwargs)

    def set_attribute(self: Any, name: str, value: Any) -> None:
        original.__setattr__(self, name, value)
        vars(self)[_PLACE].watch(value)

    def reduce(self: Any, protocol: Any) -> Any:
        """A copy, or what is pickled, is the pipeline without the policy."""
        application = vars(self)[_PLACE]
        state = {key: value for key, value in vars(self).items() if key != _PLACE}
        if state[application.name] is application.shown:
            state[application.name] = application.found
        return new_object, (original,), state

    content = {key: getattr(original, key) for key in ("__module__", "__qualname__", "__doc__")}
    content |= {"__call__": call, "__setattr__": set_attribute, "__reduce_ex__": reduce}
    return type(original.__name__, (Applied, original), content)


def _application(pipe: Any, what: str) -> Application:
    application = vars(pipe).get(_PLACE) if hasattr(pipe, "__dict__") else None
    if not isinstance(application, Application):
        raise ConfigError(
            f"{what}: no policy is applied to this {type(pipe).__name__}; expected a pipeline that moeca_fx.apply was "
            "called on"
        )
    return application
