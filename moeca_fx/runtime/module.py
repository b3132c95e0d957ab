"""The transformed model: an `nn.Module` of the original's class whose forward runs the compiled graphs."""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from moeca_fx.errors import UnsupportedModelError
from moeca_fx.graph.expert_stack import stack_experts
from moeca_fx.model_checks import resolve_policy
from moeca_fx.model_copy import share_weights
from moeca_fx.policies import Method, Policy
from moeca_fx.reasons import Reason
from moeca_fx.runtime.bindings import Bindings, named_tensors
from moeca_fx.runtime.memory import MemoryReport
from moeca_fx.runtime.runtime import DEFAULT_CONTEXT, Runtime, original_view
from moeca_fx.runtime.session import Session
from moeca_fx.runtime.statistics import Statistics

# Methods that a transformed model has besides the original's.
_ADDED = ("with_policy", "context", "session", "reset", "stats", "reset_stats", "memory", "cache")


class TransformedModel(nn.Module):
    """What `moeca_fx.transform` returns, mixed into a subclass of the original model's class.

    Methods of the original that call ``self.forward``, its attributes, `isinstance`, `.to()` and `state_dict()` work as
    before. The weights are shared with the original, not copied: `load_state_dict` on either is seen by both.
    """

    _moeca: Runtime

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original's forward; see `moeca_fx.transform`."""
        return self._moeca.call(self, args, kwargs)

    def with_policy(
        self, policy: Method | Policy | str | PathLike[str] | None, *, compile: bool | None = None
    ) -> "TransformedModel":
        """The same model under another policy, in a fraction of the time of `transform`: nothing is traced again.

        Weights are shared; trajectories, statistics and caches are not.

        Args:
            policy: as for `moeca_fx.transform`.
            compile: as for `moeca_fx.transform`; None keeps what this model does.

        Raises:
            ConfigError, UnsupportedModelError: `policy` is no policy, or the model lacks what it needs.
        """
        parts = None if policy is None else resolve_policy(policy)
        return make_transformed(original_view(self), self._moeca.under(parts, compile))

    def context(self, name: str) -> AbstractContextManager[None]:
        """Calls inside ``with model.context(name):`` belong to a trajectory of their own.

        For samplers that call the model twice a step: one context for the conditional call, one for the other.
        """
        return self._moeca.context(name)

    @contextmanager
    def session(self) -> Iterator[Session]:
        """Calls inside ``with model.session() as session:`` are one run, whose steps ``session.next_step()`` announces.

        No timestep is looked at, each of several calls a step has its own trajectory, and at the end the caches are
        freed. See `moeca_fx.runtime.session`.
        """
        session = self._moeca.open_session()
        try:
            with self._moeca.within(session):
                yield session
        except BaseException:
            self._moeca.close(session, quiet=True)
            raise
        self._moeca.close(session)

    def reset(self, context: str | None = None) -> None:
        """Begin a new trajectory with the next call, in one context or in all, and free the caches."""
        self._moeca.reset(context)

    def stats(self) -> Statistics:
        """What was executed and reused so far, over all contexts."""
        return self._moeca.stats()

    def reset_stats(self) -> None:
        """Set all statistics to zero; trajectories and caches go on."""
        self._moeca.reset_stats()

    def memory(self) -> MemoryReport:
        """Bytes that the caches hold now; `moeca_fx.estimate_memory` tells before a run."""
        return self._moeca.memory()

    def cache(self, context: str = DEFAULT_CONTEXT) -> dict[str, Tensor]:
        """The cache tensors of a context, by ``<site>.<kind>``; for inspection and tests."""
        return self._moeca.cache(context)

    def __deepcopy__(self, memo: dict[int, Any]) -> "TransformedModel":
        """A model of its own weights; graphs are compiled again at its first call."""
        if hasattr(super(), "__deepcopy__"):
            copied: TransformedModel = super().__deepcopy__(memo)  # type: ignore[misc]  # the original's own
            return copied
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        object.__setattr__(copied, "__dict__", copy.deepcopy(self.__dict__, memo))
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refused: graphs and caches have no saved form here.

        Raises:
            UnsupportedModelError: always.
        """
        raise UnsupportedModelError(
            f"{type(self).__name__}: a transformed model cannot be pickled, nor saved whole by torch.save; save its "
            "state_dict() and transform again where it is loaded, or export it: moeca_fx.export"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TransformedModel":
        """Move or cast like any module: graphs follow weights that moved, and are made again for cast ones."""
        with self._moved():
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # nn.Module leaves it untyped
        return self

    def _follow(self, model: nn.Module) -> None:
        """Take the weights of `model`, of which this is the transformed one, and which moved."""
        stack_experts(model, self._moeca.regions)
        theirs = named_tensors(model)
        with self._moved():
            for name, tensor in named_tensors(self).items():
                tensor.data = theirs[name].detach()

    @contextmanager
    def _moved(self) -> Iterator[None]:
        """Inside the block weights may become others."""
        before, bindings = self._where_and_what(), Bindings(self, self._moeca.graph_modules())
        yield
        now = self._where_and_what()
        if now == before:
            return
        (_, types, devices), (_, before_types, before_devices) = zip(*now, strict=True), zip(*before, strict=True)
        stack_experts(self, self._moeca.regions)
        if types != before_types or not bindings.follow(self):
            self._moeca.forget_programs()
        elif devices != before_devices:
            self._moeca.trajectories.clear()  # their caches are where the weights were

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As `nn.Module.load_state_dict`; with `assign`, graphs are compiled again over the new tensors."""
        result = super().load_state_dict(state_dict, strict, assign)
        if assign:
            self._rebuild()
        return result

    def _rebuild(self) -> None:
        """The weights are other tensors now: stack the experts again and drop graphs and caches."""
        stack_experts(self, self._moeca.regions)
        self._moeca.forget_programs()

    def _where_and_what(self) -> list[tuple[int, torch.dtype, torch.device]]:
        """Address, dtype and device of every parameter and buffer."""
        tensors = [*self.parameters(), *self.buffers()]
        return [(tensor.data_ptr(), tensor.dtype, tensor.device) for tensor in tensors]


def make_transformed(model: nn.Module, runtime: Runtime) -> TransformedModel:
    """A copy of `model` that shares its tensors and runs through `runtime`."""
    original = type(model)
    taken = [name for name in _ADDED if hasattr(model, name)]
    if taken:
        raise UnsupportedModelError(
            f"{original.__name__} has attributes of its own that a transformed model needs for itself: "
            f"{', '.join(taken)}; rename them",
            code=Reason.NOT_COPYABLE,
        )
    clone = share_weights(model)

    @functools.wraps(original.forward)
    def forward(self: TransformedModel, *args: Any, **kwargs: Any) -> Any:
        return TransformedModel.forward(self, *args, **kwargs)

    clone.__class__ = type(original.__name__, (TransformedModel, original), {"forward": forward})
    object.__setattr__(clone, "_moeca", runtime)
    assert isinstance(clone, TransformedModel)
    return clone
