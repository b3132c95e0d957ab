"""The denoiser's stand-in: what a pipeline holds while a policy is applied to it.

    pipe.transformer   model  -->  a stand-in: class name, attributes, weights and modules are the model's own
                                     outside of requests, it runs as the model
                                     in a request, it runs what `Denoiser` made of the model

The stand-in shares its model's ``__dict__``: what is done to it (`.to()`, attributes, adapters, weights) is done to the
model.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from moeca_fx.pipelines.denoiser import Denoiser


class StandIn(nn.Module):
    """Mixed into a subclass of the model's class; its state lies in a slot, because its ``__dict__`` is the model's."""

    __slots__ = ()
    _moeca_denoiser: Denoiser

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """In a request without hooks: those on the model are another pipeline's, which is tracing it in its thread.

        What accelerate left on the instance to move the model is run by `Denoiser.call`.
        """
        if self._moeca_denoiser.current is not None:
            return type(self).forward(self, *args, **kwargs)
        return super().__call__(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "StandIn":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # nn.Module leaves it untyped
        self._moeca_denoiser.drop_if_changed()
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy is a copy of the model."""
        return copy.deepcopy(self._moeca_denoiser.model, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """What is pickled is the model."""
        model: Any = self._moeca_denoiser.model
        return new_object, (type(model),), model.__getstate__()


def stand_in(denoiser: Denoiser) -> StandIn:
    """A module that a pipeline cannot tell from the model."""
    model = denoiser.model
    original: Any = type(model)

    @functools.wraps(original.forward)
    def forward(self: StandIn, *args: Any, **kwargs: Any) -> Any:
        return denoiser.call(functools.partial(original.forward, self), args, kwargs)

    @contextmanager
    def cache_context(self: StandIn, name: str, **kwargs: Any) -> Iterator[None]:
        """diffusers' pipelines name their calls so, for caches like this one."""
        plain = nullcontext() if denoiser.current is not None else original.cache_context(self, name, **kwargs)
        with denoiser.named(name), plain:
            yield

    content = {key: getattr(original, key) for key in ("__module__", "__qualname__", "__doc__")}
    content |= {"__slots__": ("_moeca_denoiser",), "forward": forward}
    if hasattr(original, "cache_context"):
        content["cache_context"] = cache_context
    made: StandIn = object.__new__(type(original.__name__, (StandIn, original), content))
    object.__setattr__(made, "__dict__", model.__dict__)
    object.__setattr__(made, "_moeca_denoiser", denoiser)
    return made


def new_object(cls: type) -> Any:
    """An object whose state is still to come: copies and pickles begin so."""
    return object.__new__(cls)
