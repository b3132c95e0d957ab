"""Which library multiplies matrices fastest on this CPU: torch's default or oneDNN; found by measuring, once a process.

On CPUs where the default library runs below the vector units' rate, oneDNN is two to three times faster in fp32; on
others, and for a handful of rows, it is not. Vendor names tell nothing, so both are timed.
"""

import functools
import logging
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from moeca_fx.kernels.cpu import ops as kernels

log = logging.getLogger(__name__)
_WIDTH = 256
_ROW_COUNTS = (32, 128, 512)
_REPEATS = 9
_MARGIN = 0.9  # oneDNN must take less than this share of the default's time


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` through oneDNN, fp32 on a CPU."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def has_onednn() -> bool:
    """Whether this build of torch brings the oneDNN linear."""
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # untyped in torch
    return bool(available) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


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
            default = _median_seconds(lambda x=x: functional.linear(x, weight))  # type: ignore[misc]
            onednn = _median_seconds(lambda x=x: onednn_linear(x, weight, None))  # type: ignore[misc]
            log.debug("fp32 linear, %d rows: default %.1f us, oneDNN %.1f us", count, default * 1e6, onednn * 1e6)
            if onednn > _MARGIN * default:
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
        default = _median_seconds(lambda: functional.linear(x, weight))
        widened = _median_seconds(lambda: torch.ops.moeca_cpu.linear(x, weight, None))
    log.debug("bf16 linear, %d rows: default %.1f us, widened %.1f us", rows, default * 1e6, widened * 1e6)
    return widened < _MARGIN * default


def _median_seconds(run: Callable[[], Tensor]) -> float:
    run()
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return sorted(times)[_REPEATS // 2]
