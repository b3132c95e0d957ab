"""The settings worth having: those that no other beats in both speed-up and PSNR."""

from collections.abc import Callable, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def frontier(items: Sequence[Item], speedup: Callable[[Item], float], psnr: Callable[[Item], float]) -> list[Item]:
    """These settings by rising speed-up; of equals one."""
    kept: list[Item] = []
    for item in sorted(items, key=lambda each: (speedup(each), psnr(each)), reverse=True):
        if not kept or psnr(item) > psnr(kept[-1]):
            kept.append(item)
    return kept[::-1]
