"""`apply` and `remove`: a policy on a diffusers pipeline, in one line, and off again.

pipe.__class__     DiTPipeline  -->  a subclass of the same name (see `request`)
pipe.transformer   the model    -->  its stand-in (see `stand_in`)
"""

import functools
from os import PathLike
from typing import Any, TypeVar

from torch import nn

from moeca_fx.errors import ConfigError
from moeca_fx.graph.storage import CacheDtype
from moeca_fx.model_checks import resolve_policy
from moeca_fx.offloading import give_back
from moeca_fx.pipelines.checks import check_denoiser, check_pipeline, check_scheduler, find_denoiser
from moeca_fx.pipelines.denoiser import Denoiser
from moeca_fx.pipelines.request import PLACE, Application, applied_class
from moeca_fx.pipelines.stand_in import StandIn
from moeca_fx.policies import Method, MoECa, Policy
from moeca_fx.runtime.accounting import Accounting
from moeca_fx.runtime.lock import TRACING
from moeca_fx.runtime.options import memory_options
from moeca_fx.runtime.statistics import Statistics
from moeca_fx.runtime.timestep import ANNOUNCED
from moeca_fx.transform import transform

Pipeline = TypeVar("Pipeline")
_DEFAULT = MoECa()


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
    if PLACE in vars(pipe):
        raise ConfigError(
            f"{type(pipe).__name__}: a policy is applied to this pipeline already; call moeca_fx.remove(pipe) first"
        )
    parts = None if policy is None else resolve_policy(policy)
    memory_options(cache_dtype, cache_limit, chunk)  # what is wrong with them is told now
    make = functools.partial(
        transform,
        policy=parts,
        timestep=ANNOUNCED,
        compile=compile,
        cache_dtype=cache_dtype,
        cache_limit=cache_limit,
        chunk=chunk,
    )
    check_scheduler(pipe)
    name = find_denoiser(pipe, denoiser)
    found: nn.Module = getattr(pipe, name)
    model = found._moeca_denoiser.model if isinstance(found, StandIn) else found  # shared with another pipeline
    with TRACING:
        check_denoiser(pipe, name, model)
    application = Application(pipe, name, found, Denoiser(model, make))
    vars(pipe)[PLACE] = application
    vars(pipe)[name] = application.shown
    pipe.__class__ = applied_class(type(pipe))
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
    if application.denoiser.current is not None:
        raise ConfigError(f"{type(pipe).__name__}: remove was called within a request; call it after pipe(...)")
    pipe.__class__ = application.original
    del vars(pipe)[PLACE]
    if vars(pipe)[application.name] is application.shown:
        vars(pipe)[application.name] = application.found
    application.denoiser.removed, application.denoiser.fast = True, None
    give_back(application.denoiser.model)
    return pipe


def stats(pipe: object) -> Statistics:
    """What a pipeline executed and reused since `apply`, or since its denoiser moved or changed; at first nothing.

    Raises:
        ConfigError: no policy is applied to it.
    """
    fast = _application(pipe, "stats").denoiser.fast
    return Accounting().statistics() if fast is None else fast.stats()


def _application(pipe: Any, what: str) -> Application:
    application = vars(pipe).get(PLACE) if hasattr(pipe, "__dict__") else None
    if not isinstance(application, Application):
        raise ConfigError(
            f"{what}: no policy is applied to this {type(pipe).__name__}; expected a pipeline that moeca_fx.apply was "
            "called on"
        )
    return application
