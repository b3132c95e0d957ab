"""Interleaved timing: all variants take turns, and a ratio is the median of the ratios within a round."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

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
        cut = turn % len(names)
        for name in names[cut:] + names[:cut]:
            if twice:
                runs[name]()
            start = time.perf_counter()
            runs[name]()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(over: list[float], under: list[float]) -> float:
    """Median over the rounds of one time over the other's."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def milliseconds(seconds: list[float]) -> float:
    """Median, in ms."""
    return statistics.median(seconds) * 1e3
