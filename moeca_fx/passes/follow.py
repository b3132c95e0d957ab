"""Run a model while `KnownValues` follows what does not depend on its inputs: traced, and on real inputs to check.

    trace, example inputs     sizes known: 4, 4, 16      baked into the graph
    eager, example inputs     sizes read:  4, 4, 16
    eager, other inputs       sizes read:  4, 4, 16      equal, or the trace is refused

A number is known only if no input's value reaches it; running the model on two inputs of other values shows that it
is so on the model as it runs, too.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from moeca_fx.discover import MoERegion
from moeca_fx.discover.method import replaced_method
from moeca_fx.errors import CaptureError
from moeca_fx.graph.constants import KnownValues
from moeca_fx.model_checks import run_once
from moeca_fx.reasons import Reason

Scalars = list[float | int | bool]


class Following:
    """What is known of the model's last run inside `known_values`."""

    def __init__(self) -> None:
        self.last = KnownValues()

    @property
    def scalars(self) -> Scalars:
        """As in `KnownValues`."""
        return self.last.scalars

    @property
    def unknown(self) -> list[str]:
        """As in `KnownValues`."""
        return self.last.unknown


@contextmanager
def known_values(model: nn.Module) -> Iterator[Following]:
    """Follow every run of `model` inside the block, from within its forward: before anything that traces it."""
    forward, following = model.forward, Following()

    @functools.wraps(forward)
    def followed(*args: Any, **kwargs: Any) -> Any:
        following.last = KnownValues()
        with following.last:
            return forward(*args, **kwargs)

    with replaced_method(model, "forward", followed):
        yield following


def run_following(
    model: nn.Module, regions: Iterable[MoERegion], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, Scalars]:
    """The model's result, and the known numbers outside of its regions.

    Raises:
        InputError: the model cannot run on these inputs.
    """
    with ExitStack() as stack:
        for region in regions:
            owner = model.get_submodule(region.path)
            stack.enter_context(replaced_method(owner, region.method, _unfollowed(getattr(owner, region.method))))
        following = stack.enter_context(known_values(model))
        return run_once(model, args, kwargs), following.scalars


def check_same_values(model: nn.Module, first: Scalars, second: Scalars) -> None:
    """Raise `CaptureError` when numbers that were taken for constants differ between two inputs of equal shapes."""
    if repr(first) != repr(second):  # NaN equals NaN
        differ = [f"{a} and {b}" for a, b in zip(first, second, strict=False) if repr(a) != repr(b)]
        found = differ[0] if differ else f"{len(first)} and {len(second)} of them"
        raise CaptureError(
            f"{type(model).__name__}: a number that Python reads seemed to follow from shapes alone, but is another "
            f"for other values of the inputs: {found}; the model may hold state or data-dependent Python",
            code=Reason.TRACE_DIFFERS,
        )


def _unfollowed(method: Any) -> Any:
    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return method(*args, **kwargs)

    return run
