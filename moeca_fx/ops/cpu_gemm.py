"""Which linear is fastest on this CPU: torch's default, oneDNN's or the own; found by measuring, once a process.

Default libraries copy a weight into an order of their own at every call, which few rows do not pay for; the own kernel
reads it where it lies. On CPUs where the default runs below the vector units' rate, oneDNN is faster from some number
of rows on, by a tenth or several times. Vendor names tell nothing, so all are timed.
"""

import functools
import logging
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from moeca_fx.kernels.cpu import ops as kernels
from moeca_fx.ops.measured import last_faster, share_of_time

log = logging.getLogger(__name__)
_WIDTH = 384
_FEW_ROW_COUNTS = (4, 16, 64, 256, 512, 1024)
_ROW_COUNTS = (32, 128, 512)
_MARGIN = 0.95  # of the default's time is what must be undercut: more than noise explains


def has_onednn() -> bool:
    """Whether this build of torch brings the oneDNN linear."""
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # untyped in torch
    return bool(available) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@dataclass(frozen=True)
class Fastest:
    """Which fp32 linear is fastest by the number of rows; between the two limits torch's default is.

    Attributes:
        own_up_to: the own kernel up to so many rows; 0 for none. Beyond 64 only of large weights, and without oneDNN.
        onednn_from: oneDNN from so many rows on; None never.
    """

    own_up_to: int = 0
    onednn_from: int | None = None

    def without_onednn(self) -> "Fastest":
        """Where the number of rows is another at every call: oneDNN compiles a kernel for each."""
        return Fastest(self.own_up_to)

    def never(self, rows: int) -> bool:
        """Whether the default serves so many rows and any multiple of them."""
        return self.onednn_from is None and rows > self.own_up_to


@functools.cache
def fastest_linear() -> Fastest:
    """What is fastest on this machine; takes some tenths of a second."""
    if not kernels.available():
        return Fastest()
    with torch.inference_mode():
        weight = torch.randn(4 * _WIDTH, _WIDTH)  # more outputs than inputs, as modulations and projections have
        own = last_faster(_FEW_ROW_COUNTS, lambda count: _share("the own kernel", count, weight, count, None), _MARGIN)
        onednn = None
        if has_onednn():
            onednn = last_faster(reversed(_ROW_COUNTS), lambda count: _share("oneDNN", count, weight, 0, 0), _MARGIN)
    return Fastest(own or 0, onednn)


def _share(name: str, count: int, weight: Tensor, own_up_to: int, onednn_from: int | None) -> float:
    x = torch.randn(count, weight.shape[1])
    share = share_of_time(
        lambda: torch.ops.moeca_cpu.chosen_linear(x, weight, None, own_up_to, onednn_from),
        lambda: functional.linear(x, weight),
    )
    log.debug("fp32 linear, %d rows: %s takes %.2f of the default's time", count, name, share)
    return share


@functools.cache
def widening_is_faster() -> bool:
    """Whether a bf16 linear is faster through fp32 products of widened panels than as torch has it.

    Processors without bf16 instructions multiply bf16 several times slower than fp32. Takes some ten milliseconds.
    """
    if not kernels.available():
        return False
    with torch.inference_mode():
        rows = _ROW_COUNTS[-1]
        x, weight = torch.randn(rows, _WIDTH).bfloat16(), torch.randn(_WIDTH, _WIDTH).bfloat16()
        share = share_of_time(lambda: torch.ops.moeca_cpu.linear(x, weight, None), lambda: functional.linear(x, weight))
    log.debug("bf16 linear, %d rows: widened products take %.2f of the default's time", rows, share)
    return share < _MARGIN
