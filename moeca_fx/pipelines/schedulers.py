"""Hear when a scheduler steps, while a request lasts.

    scheduler.__class__   EulerDiscreteScheduler  -->  a subclass of the same name whose `step` also tells the listeners

The class is changed and not the instance's `step`, because pipelines copy schedulers: a copy of an instance with a
bound method of its own would step the original. With the last listener, the scheduler is as it was.
"""

import functools
from contextlib import suppress
from typing import Any, Protocol


class Listener(Protocol):
    """Who is told."""

    def stepped(self) -> None:
        """A step was finished."""

    def timesteps_set(self) -> None:
        """Sampling starts over."""


class _Listeners(list[Listener]):
    """Those of a scheduler and of its copies."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Listeners":
        return self


class _Watched:
    """What the subclass of a watched scheduler adds."""

    _moeca_original: type
    _moeca_listeners: _Listeners


def is_scheduler(value: object) -> bool:
    """Whether it is stepped as diffusers' schedulers are."""
    return all(callable(getattr(type(value), name, None)) for name in ("step", "set_timesteps"))


def watch(scheduler: Any, listener: Listener) -> None:
    """Tell `listener` of every step until `unwatch`."""
    if not isinstance(scheduler, _Watched):
        vars(scheduler)["_moeca_listeners"] = _Listeners()
        scheduler.__class__ = _watched_class(type(scheduler))
    scheduler._moeca_listeners.append(listener)


def unwatch(scheduler: Any, listener: Listener) -> None:
    """Undo `watch`."""
    if not isinstance(scheduler, _Watched):
        return
    with suppress(ValueError):
        scheduler._moeca_listeners.remove(listener)
    if not scheduler._moeca_listeners:
        del vars(scheduler)["_moeca_listeners"]
        scheduler.__class__ = scheduler._moeca_original


def _watched_class(original: Any) -> type:
    @functools.wraps(original.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original.step(self, *args, **kwargs)
        for listener in tuple(self._moeca_listeners):
            listener.stepped()
        return result

    @functools.wraps(original.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        for listener in tuple(self._moeca_listeners):
            listener.timesteps_set()
        return original.set_timesteps(self, *args, **kwargs)

    names = {key: getattr(original, key) for key in ("__module__", "__qualname__", "__doc__")}
    added = {"step": step, "set_timesteps": set_timesteps, "_moeca_original": original}
    return type(original.__name__, (_Watched, original), names | added)
