"""What replaces a library's operation because it is faster on this machine: the measurement that decides."""

import statistics
import time
from collections.abc import Callable, Iterable

from torch import Tensor

REPEATS = 15


def share_of_time(run: Callable[[], Tensor], default: Callable[[], Tensor]) -> float:
    """Time of `run` over that of `default`: the median of the ratios of runs that take turns."""
    for warm in (run, default):
        warm()
    return statistics.median(_seconds(run) / _seconds(default) for _ in range(REPEATS))


def last_faster(counts: Iterable[int], share: Callable[[int], float], margin: float) -> int | None:
    """The last of `counts` up to which every share of the default's time is at most `margin`; None at the first."""
    last = None
    for count in counts:
        if share(count) > margin:
            break
        last = count
    return last


def _seconds(run: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
