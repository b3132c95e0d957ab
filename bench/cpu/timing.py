"""Interleaved timing: all variants take turns, and a ratio is the median of the ratios within a round."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

from moeca_fx.timing import median_speedup as ratio
from moeca_fx.timing import rotated

__all__ = ["interleave", "milliseconds", "ratio"]

Run = Callable[[], Any]


def interleave(runs: Mapping[str, Run], rounds: int, *, twice: bool = False) -> dict[str, list[float]]:
    """Seconds of every run, one value a round; the order rotates, and one round before is not counted.

    Args:
        twice: run each twice in its turn and time the second. Steps of a trajectory follow steps that touched the same
            memory; after a turn of the others, caches of the processor would hold theirs.
    """
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name in rotated(names, turn):
            if twice:
                runs[name]()
            start = time.perf_counter()
            runs[name]()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def milliseconds(seconds: list[float]) -> float:
    """Median, in ms."""
    return statistics.median(seconds) * 1e3
