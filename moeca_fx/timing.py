"""Fair timing on a machine that is not quiet: whole trajectories of all variants, interleaved.

A machine's speed drifts over minutes (clock, temperature, neighbours), so the variants take turns in one
process and a speed-up is the median of the ratios *within* a round, never a ratio of two separate averages.
The order rotates from round to round, so that no variant always runs first.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from moeca_fx.errors import MoecaError

Trajectory = Callable[[], Tensor]
"""Runs one whole trajectory and returns its images, [B, C, H, W]."""

TRIALS = 3
"""Runs for each number of threads before one is chosen."""


def most_threads() -> int:
    """Two, the size the demo and the bench are measured for, or one where only one core is there."""
    return min(2, os.cpu_count() or 1)


@contextmanager
def pinned_threads(threads: int) -> Iterator[None]:
    """Let torch use exactly `threads` CPU threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fastest_threads(run: Callable[[], object], most: int) -> int:
    """How many CPU threads, 1 to `most`, make `run` fastest now.

    On a busy machine threads wait for each other at every operation, and one is many times faster than two.
    """
    seconds: dict[int, list[float]] = {threads: [] for threads in range(1, most + 1)}
    for _ in range(TRIALS):
        for threads, times in seconds.items():
            with pinned_threads(threads):
                start = time.perf_counter()
                run()
                times.append(time.perf_counter() - start)
    return min(seconds, key=lambda threads: statistics.median(seconds[threads]))


def time_interleaved(
    variants: Mapping[str, Trajectory], repeats: int
) -> tuple[dict[str, tuple[float, ...]], dict[str, Tensor]]:
    """Run every variant `repeats` times, taking turns.

    Returns:
        Seconds by variant, one value a round, and the images by variant.

    Raises:
        MoecaError: a variant gave other images in a later round; its times would describe different work.
    """
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    images: dict[str, Tensor] = {}
    for turn in range(repeats):
        for name in rotated(names, turn):
            start = time.perf_counter()
            result = variants[name]()
            seconds[name].append(time.perf_counter() - start)
            if not torch.equal(images.setdefault(name, result), result):
                raise MoecaError(
                    f"the variant {name!r} gave other images in round {turn + 1} than in round 1 from the "
                    "same noise; state was carried from one trajectory into the next"
                )
    return {name: tuple(values) for name, values in seconds.items()}, images


def median_speedup(baseline: Sequence[float], seconds: Sequence[float]) -> float:
    """Median over the rounds of baseline time over time."""
    return statistics.median(base / own for base, own in zip(baseline, seconds, strict=True))


def rotated(names: list[str], turn: int) -> list[str]:
    """The order of a round: another variant begins each."""
    cut = turn % len(names)
    return names[cut:] + names[:cut]
