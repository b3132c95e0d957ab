"""What becomes of a pipeline's denoiser: transformed at its first call, dropped when it changes, run by run.

    the first call's own inputs  -->  transform(model, inputs): keyword calls, tuples or dataclasses, any size

The transformed model shares the model's weights. When the model's tensors, modules or attention processors are other
ones than those it was made from, it is dropped, and made anew at the next call.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from moeca_fx.discover.adapted import adapter_states
from moeca_fx.model_wrappers import is_own_forward
from moeca_fx.offloading import whole_model_hook, without_hook
from moeca_fx.runtime.lock import TRACING
from moeca_fx.runtime.module import TransformedModel
from moeca_fx.runtime.session import Session

log = logging.getLogger("moeca_fx.pipeline")


class Denoiser:
    """A model and what became of it.

    Args:
        model: as the pipeline held it.
        make: transforms it, from the (model, args, kwargs) of one call.

    Attributes:
        fast: the transformed model, from the first call on.
        removed: whether the pipeline has the model back; others may hold the stand-in still.
    """

    def __init__(self, model: nn.Module, make: Callable[..., TransformedModel]) -> None:
        self.model = model
        self._make = make
        self.fast: TransformedModel | None = None
        self.removed = False
        self._made_from = _Parts(nn.Module())
        self._places: list[int] = []
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
    def current(self) -> "Run | None":
        """The request that is on."""
        return self._run.get()

    def call(self, otherwise: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of the stand-in; `otherwise` is the model's own forward."""
        run = self._run.get()
        if run is None or self.removed:
            return otherwise(*args, **kwargs)
        hook = whole_model_hook(self.model)
        if hook is not None:
            args, kwargs = hook.pre_forward(self.model, *args, **kwargs)
            self.follow()
        fast = self.fast or self._transform(args, kwargs)
        name = self._name.get()
        with fast._moeca.within(run.session(fast)), nullcontext() if name is None else fast.context(name):
            result = fast(*args, **kwargs)
        return result if hook is None else hook.post_forward(self.model, result)

    def _transform(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TransformedModel:
        """From the first call's own inputs; inference tensors are copied, because they cannot be traced."""
        log.info("%s: transforming at its first call", type(self.model).__name__)
        with TRACING, torch.inference_mode(False), torch.no_grad():
            args, kwargs = pytree.tree_map_only(Tensor, lambda leaf: leaf.detach().clone(), (args, kwargs))
            with without_hook(self.model):
                self.fast = self._make(self.model, args, kwargs)
        self._made_from, self._places = _Parts(self.model), _places(self.model)
        return self.fast

    def drop_if_changed(self) -> None:
        """Forget the transformed model when the model's tensors or modules are others by now."""
        if self.fast is not None and _Parts(self.model).names != self._made_from.names:
            log.info("%s: its weights or modules changed; it is transformed again", type(self.model).__name__)
            self.fast = None
        self.follow()

    def follow(self) -> None:
        """Where the model's weights lie elsewhere by now, so do those of the transformed model and its graphs."""
        places = _places(self.model)
        if self.fast is not None and places != self._places:
            self.fast._follow(self.model)
            self._places = _places(self.model)  # experts were stacked again


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


def _places(model: nn.Module) -> list[int]:
    """Where the weights lie."""
    return [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]


class _Parts:
    """What a model is made of: equal as long as nothing is exchanged; values of tensors may change, they are shared.

    Attributes:
        names: of modules, tensors, and of what is called besides (attention processors), with what tells them apart,
            and what adapters are set to.
        alive: these objects, so that others cannot take their addresses.
    """

    def __init__(self, model: nn.Module) -> None:
        tensors = [*model.named_parameters(), *model.named_buffers()]
        with without_hook(model):
            called = [
                (f"{path}.{name}", value)
                for path, module in model.named_modules()
                for name, value in vars(module).items()
                if callable(value)
                and not isinstance(value, Tensor)
                and name != "_old_forward"  # which accelerate leaves before its hook is there
                and not (name == "forward" and is_own_forward(module))
            ]
        modules = [(path, module) for path, module in model.named_modules(remove_duplicate=False) if path]
        self.alive = [*called, *modules]
        self.names = (
            *((path, id(value), type(value)) for path, value in self.alive),
            *((name, tensor.dtype, tensor.shape) for name, tensor in tensors),
            *adapter_states(model),
        )
