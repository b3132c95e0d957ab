"""Autocast: what the caller's is, and running code under it or without it.

    with torch.autocast("cpu", torch.bfloat16):     Autocast.now(): cpu torch.bfloat16
        fast(x, t)                                  discovered, proven and traced under it: its casts become operations
                                                    of the graph, which runs with autocast off

The results of operations in a lower dtype may end in tensors of a higher one, with the lower one's rounding errors; so
what a value is compared with depends on the autocast that it was computed under (`computed_in`).
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

_DEVICES = tuple(kind for kind in ("cpu", "cuda", "xpu", "mps", "hpu") if torch.amp.is_autocast_available(kind))


@dataclass(frozen=True)
class Autocast:
    """A state of autocast.

    Attributes:
        dtypes: type of device, and the dtype that its operations are cast to; none where it is off.
    """

    dtypes: tuple[tuple[str, torch.dtype], ...] = ()

    @classmethod
    def now(cls) -> "Autocast":
        """The state of the running thread."""
        found = [(kind, torch.get_autocast_dtype(kind)) for kind in _DEVICES if torch.is_autocast_enabled(kind)]
        return cls(tuple(found)) if found else OFF

    def __str__(self) -> str:
        return ", ".join(f"{kind} {dtype}" for kind, dtype in self.dtypes) or "off"

    @contextmanager
    def around(self) -> Iterator[None]:
        """This state inside the block; cast weights are not kept, because a trace must not find those of a run."""
        before, wanted = Autocast.now(), dict(self.dtypes)
        with ExitStack() as stack:
            for kind in {**dict(before.dtypes), **wanted} if before.dtypes or wanted else ():
                dtype = wanted.get(kind)
                stack.enter_context(torch.autocast(kind, dtype, enabled=dtype is not None, cache_enabled=False))
            yield


OFF = Autocast()


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype whose rounding errors a value of `dtype` may have, which is a coarser one under autocast."""
    if not dtype.is_floating_point:
        return dtype
    return max((dtype, *(lower for _, lower in Autocast.now().dtypes)), key=lambda each: torch.finfo(each).eps)
