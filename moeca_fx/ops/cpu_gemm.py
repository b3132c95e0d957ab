"""Which library multiplies matrices fastest on this CPU: torch's default or oneDNN; found by measuring, once a process.

On CPUs where the default library runs below the vector units' rate, oneDNN is faster in fp32, by a tenth or several
times; on others, and for a handful of rows, it is not. Vendor names tell nothing, so both are timed.
"""

import functools
import logging

import torch
from torch.nn import functional

from moeca_fx.kernels.cpu import ops as kernels
from moeca_fx.ops.measured import share_of_time

log = logging.getLogger(__name__)
_WIDTH = 384
_ROW_COUNTS = (32, 128, 512)
_MARGIN = 0.95  # of the default's time is what must be undercut: more than noise explains


def has_onednn() -> bool:
    """Whether this build of torch brings the oneDNN linear, and the kernels call it."""
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # untyped in torch
    return bool(available) and hasattr(torch.ops.mkldnn, "_linear_pointwise") and kernels.available()


@functools.cache
def onednn_from_rows() -> int | None:
    """Smallest number of rows from which oneDNN's fp32 linear is faster; None when it never is. Takes milliseconds."""
    if not has_onednn():
        return None
    with torch.inference_mode():
        weight = torch.randn(_WIDTH, _WIDTH)
        best: int | None = None
        for count in reversed(_ROW_COUNTS):
            x = torch.randn(count, _WIDTH)
            share = share_of_time(
                lambda x=x: torch.ops.moeca_cpu.onednn_linear(x, weight, None, 0),  # type: ignore[misc]
                lambda x=x: functional.linear(x, weight),  # type: ignore[misc]
            )
            log.debug("fp32 linear, %d rows: oneDNN takes %.2f of the default's time", count, share)
            if share > _MARGIN:
                break
            best = count
    return best


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
