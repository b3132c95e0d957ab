"""The denoiser's stand-in: what a pipeline holds while a policy is applied to it.

    pipe.transformer   model  -->  a stand-in: class name, attributes, weights and modules are the model's own
                                     outside of requests, it runs as the model
                                     in a request, it runs `transform(model)`, made at its first call from that call

The stand-in shares its model's ``__dict__``. So whatever is done to it (`.to()`, attributes, adapters, new weights) is
done to the model; when that changes tensors or modules, the transformed model is dropped and made anew when needed.
"""

import copy
import functools
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from moeca_fx.runtime.module import TransformedModel
from moeca_fx.runtime.session import Session
from moeca_fx.transform import Settings, transform_with

log = logging.getLogger("moeca_fx.pipeline")
_one_at_a_time = threading.Lock()  # transform swaps methods of the model while it traces


class Denoiser:
    """A model and what became of it.

    Args:
        model: as the pipeline held it.
        settings: of the transformed model; its calls are announced.

    Attributes:
        fast: the transformed model, from the first call on.
        removed: whether the stand-in is one no more, though someone may still hold it.
    """

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.model = model
        self.settings = settings
        self.fast: TransformedModel | None = None
        self.removed = False
        self._made_from: tuple[Any, ...] = ()
        self._run: ContextVar[Run | None] = ContextVar("moeca_fx_run", default=None)
        self._name: ContextVar[str | None] = ContextVar("moeca_fx_name", default=None)

    @contextmanager
    def run(self) -> Iterator["Run"]:
        """A request: calls inside the block are its, and its caches are freed at the end."""
        self.drop_if_changed()
        run = Run()
        token = self._run.set(run)
        try:
            yield run
        except BaseException:
            run.quiet = True
            raise
        finally:
            self._run.reset(token)
            run.close()

    @contextmanager
    def named(self, name: str) -> Iterator[None]:
        """Calls inside the block belong to the context that the pipeline names."""
        token = self._name.set(name)
        try:
            yield
        finally:
            self._name.reset(token)

    @property
    def running(self) -> bool:
        """Whether a request is on."""
        return self._run.get() is not None

    def call(self, otherwise: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of the stand-in; `otherwise` is the model's own forward."""
        run = self._run.get()
        if run is None or self.removed:
            return otherwise(*args, **kwargs)
        fast = self.fast or self._transform(args, kwargs)
        name = self._name.get()
        with fast._moeca.within(run.session(fast)), nullcontext() if name is None else fast.context(name):
            return fast(*args, **kwargs)

    def _transform(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TransformedModel:
        """From the first call's own inputs; inference tensors are copied, because they cannot be traced."""
        log.info("%s: transforming at its first call", type(self.model).__name__)
        with _one_at_a_time, torch.inference_mode(False), torch.no_grad():
            args, kwargs = pytree.tree_map_only(Tensor, lambda leaf: leaf.detach().clone(), (args, kwargs))
            self.fast = transform_with(self.model, args, kwargs, self.settings)
        self._made_from = _tensors_and_modules(self.model)
        return self.fast

    def drop_if_changed(self) -> None:
        """Forget the transformed model when the model's tensors or modules are others by now."""
        if self.fast is not None and _tensors_and_modules(self.model) != self._made_from:
            log.info("%s: its weights or modules changed; it is transformed again", type(self.model).__name__)
            self.fast = None


class Run:
    """One request's sessions.

    Attributes:
        fast: the transformed model that it last called.
        quiet: whether it ended in a way that its policy was not chosen for: no warnings.
        steps: announced steps.
    """

    def __init__(self) -> None:
        self.fast: TransformedModel | None = None
        self.quiet = False
        self._session: Session | None = None

    def session(self, fast: TransformedModel) -> Session:
        """The session of this run in a transformed model."""
        if self._session is None or fast is not self.fast:
            self.close(quiet=True)
            self.fast, self._session = fast, fast._moeca.open_session()
        return self._session

    @property
    def steps(self) -> int:
        """Announced steps."""
        return 0 if self._session is None else self._session.steps

    def stepped(self) -> None:
        """See `schedulers.Listener`."""
        if self._session is not None:
            self._session.next_step()

    def timesteps_set(self) -> None:
        """See `schedulers.Listener`."""
        if self._session is not None:
            self._session.restart()

    def close(self, quiet: bool = False) -> None:
        """Free the caches."""
        if self._session is not None and self.fast is not None:
            self.fast._moeca.close(self._session, quiet=quiet or self.quiet)


class StandIn(nn.Module):
    """Mixed into a subclass of the model's class; its state lies in a slot, because its ``__dict__`` is the model's."""

    __slots__ = ()
    _moeca_denoiser: Denoiser

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "StandIn":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # nn.Module leaves it untyped
        self._moeca_denoiser.drop_if_changed()
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy is a copy of the model."""
        return copy.deepcopy(self._moeca_denoiser.model, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """What is pickled is the model."""
        model = self._moeca_denoiser.model
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
        plain = nullcontext() if denoiser.running else original.cache_context(self, name, **kwargs)
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


def _tensors_and_modules(model: nn.Module) -> tuple[Any, ...]:
    """Equal as long as neither is exchanged; values may change, for they are shared."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return (
        *((path, id(module), type(module)) for path, module in model.named_modules(remove_duplicate=False) if path),
        *((name, tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape) for name, tensor in tensors),
    )
