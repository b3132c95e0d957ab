"""Which linear is fastest on this CPU: torch's default, oneDNN's or the own; found by measuring, once a process.

Default libraries copy a weight into an order of their own at every call, which few rows do not pay for; the own kernel
reads it where it lies, or copies it where that is less than what it would copy of the rows. On CPUs where the default
runs below the vector units' rate, oneDNN is faster from some number of rows on, by a tenth or several times. Vendor
names tell nothing, so all are timed.
"""

import functools
import logging
import sys
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from moeca_fx.kernels.cpu import ops as kernels
from moeca_fx.ops.measured import last_faster, share_of_time

log = logging.getLogger(__name__)
_WEIGHTS = {1 << 15: (16, 128), 1 << 17: (384, 128), sys.maxsize: (1536, 384)}  # by values, measured in their stead
_ROW_COUNTS = (4, 16, 64, 256, 1024)
_MARGIN = 0.95  # of the default's time is what oneDNN must undercut: it compiles a kernel for every shape
_NO_SLOWER = 1.02  # within the noise of the measurement: the own kernel copies and compiles nothing


def has_onednn() -> bool:
    """Whether this build of torch brings the oneDNN linear."""
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # untyped in torch
    return bool(available) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@dataclass(frozen=True)
class Fastest:
    """Which fp32 linear is fastest by the number of rows; between the two limits torch's default is.

    Attributes:
        own_up_to: the own kernel up to so many rows; 0 for none.
        onednn_from: oneDNN from so many rows on, where the own kernel does not go first; None never.
    """

    own_up_to: int = 0
    onednn_from: int | None = None

    def never(self, rows: int) -> bool:
        """Whether the default serves so many rows and any multiple of them."""
        return self.onednn_from is None and rows > self.own_up_to


def fastest_linear(weight_values: int, *, rows_vary: bool) -> Fastest:
    """What is fastest on this machine for weights of about that size; measured once, in some tenths of a second.

    Args:
        weight_values: outputs times inputs.
        rows_vary: whether the number of rows is another at every call; oneDNN, which compiles a kernel for each, is
            then left out.
    """
    shape = next(shape for most, shape in _WEIGHTS.items() if weight_values < most)
    return _fastest(shape, rows_vary or not has_onednn())


@functools.cache
def _fastest(shape: tuple[int, int], without_onednn: bool) -> Fastest:
    if not kernels.available():
        return Fastest()
    with torch.inference_mode():
        weight = torch.randn(shape)
        onednn = None
        if not without_onednn:
            onednn = last_faster(reversed(_ROW_COUNTS), lambda count: _share("oneDNN", count, weight), _MARGIN)

        def own(count: int) -> float:
            beside_onednn = onednn is not None and count >= onednn
            return _share("the own kernel", count, weight, "oneDNN" if beside_onednn else "the default")

        last = last_faster(_ROW_COUNTS, own, _NO_SLOWER)
    return Fastest(sys.maxsize if last == _ROW_COUNTS[-1] else last or 0, onednn)


_LIMITS = {"the own kernel": (sys.maxsize, None), "oneDNN": (0, 0), "the default": (0, None)}


def _share(name: str, count: int, weight: Tensor, other: str = "the default") -> float:
    x = torch.randn(count, weight.shape[1])

    def run(limits: tuple[int, int | None]) -> Tensor:
        return cast(Tensor, torch.ops.moeca_cpu.chosen_linear(x, weight, None, *limits))

    share = share_of_time(lambda: run(_LIMITS[name]), lambda: run(_LIMITS[other]))
    log.debug("fp32 linear, %d rows of %s: %s takes %.2f of %s's time", count, list(weight.shape), name, share, other)
    return share


@functools.cache
def widening_is_faster() -> bool:
    """Whether a bf16 linear is faster through fp32 products of widened panels than as torch has it.

    Processors without bf16 instructions multiply bf16 several times slower than fp32. Takes some ten milliseconds.
    """
    if not kernels.available():
        return False
    with torch.inference_mode():
        rows = 512
        x, weight = torch.randn(rows, 384).bfloat16(), torch.randn(384, 384).bfloat16()
        share = share_of_time(lambda: torch.ops.moeca_cpu.linear(x, weight, None), lambda: functional.linear(x, weight))
    log.debug("bf16 linear, %d rows: widened products take %.2f of the default's time", rows, share)
    return share < _MARGIN
