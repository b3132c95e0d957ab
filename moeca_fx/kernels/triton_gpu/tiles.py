"""Tile sizes of the grouped GEMMs: a rule from static shapes, and a measurement that replaces it.

How many rows are live is known on the device only, so nothing here depends on it and a captured graph stays valid.
Measuring needs the host, so it is a call of its own: measure once, before capture, and pass the result on.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moeca_fx.kernels.triton_gpu._common import INTERPRETED, blocks

_REPEATS = 7


@dataclass(frozen=True)
class Tile:
    """One GEMM's tile.

    Attributes:
        rows, columns, depth: of the tile, powers of two of at least 16.
        warps, stages: warps and software-pipeline stages of a program.
        per_sm: programs of the persistent grid for each multiprocessor.
        tma: read weights through the tensor memory accelerator where their layout allows it.
    """

    rows: int
    columns: int
    depth: int
    warps: int = 4
    stages: int = 3
    per_sm: int = 2
    tma: bool = False

    def options(self) -> dict[str, Any]:
        """The launch arguments this stands for."""
        return {
            "BM": self.rows,
            "BN": self.columns,
            "BK": self.depth,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


@dataclass(frozen=True)
class Tiles:
    """Tiles of the first (gate and up) and the second (down) GEMM."""

    up: Tile
    down: Tile


# Programs a multiprocessor follow the registers and shared memory that each tile takes when compiled for Hopper.
_SMALL = Tiles(Tile(16, 64, 128, per_sm=3), Tile(16, 128, 64, per_sm=3))
_MEDIUM = Tiles(Tile(64, 64, 64), Tile(64, 128, 64, per_sm=3))
_LARGE = Tiles(Tile(128, 64, 64), Tile(128, 128, 64, warps=8, per_sm=1))
_NARROW = Tiles(Tile(32, 32, 32, stages=2, per_sm=3), Tile(32, 64, 32, stages=2, per_sm=4))
_INTERPRETED = Tiles(Tile(16, 32, 32, per_sm=1), Tile(16, 32, 32, per_sm=1))
_CANDIDATES = (
    _SMALL,
    Tiles(Tile(32, 64, 64, stages=4, per_sm=3), Tile(32, 128, 64, stages=4, per_sm=3)),
    _MEDIUM,
    Tiles(Tile(64, 64, 64, per_sm=3, tma=True), Tile(64, 128, 64, per_sm=3, tma=True)),
    Tiles(Tile(64, 128, 64, warps=8, per_sm=1, tma=True), Tile(64, 256, 64, warps=8, per_sm=1, tma=True)),
    _LARGE,
    Tiles(Tile(128, 64, 64, tma=True), Tile(128, 128, 64, warps=8, per_sm=1, tma=True)),
    Tiles(Tile(128, 128, 64, warps=8, stages=4, per_sm=1), Tile(128, 256, 64, warps=8, per_sm=1)),
    Tiles(
        Tile(128, 128, 64, warps=8, stages=4, per_sm=1, tma=True),
        Tile(128, 256, 64, warps=8, stages=4, per_sm=1, tma=True),
    ),
)


def _is_narrow(weight: Tensor) -> bool:
    """Whether loads are narrow: fp32, which has no tensor cores, or widths that are no multiple of 16 bytes."""
    return weight.dtype == torch.float32 or any(size * weight.itemsize % 16 for size in weight.shape[1:])


def default_tiles(rows: int, up: Tensor) -> Tiles:
    """Tiles by rule.

    Args:
        rows: branches that can be live at most, N*k.
        up: [E, I, H] weights of the up projection.
    """
    if INTERPRETED:
        return _INTERPRETED
    if _is_narrow(up):
        return _NARROW
    each = rows / up.shape[0]
    return _SMALL if each <= 32 else _MEDIUM if each <= 256 else _LARGE


def tuned_tiles(run: Callable[[Tiles], object], rows: int, up: Tensor) -> Tiles:
    """The fastest candidates for `run`, the up and the down GEMM chosen apart; synchronises with the device.

    Args:
        run: launches `gated_experts` on live rows as they are expected in use, with the tiles it is given.
        rows, up: as for `default_tiles`, whose tiles are compared too.
    """
    best = default_tiles(rows, up)
    if INTERPRETED or _is_narrow(up):
        return best
    fits = [each for each in _CANDIDATES if each.up.rows <= max(64, 2 * rows // up.shape[0])]
    shortest = _milliseconds(run, best)
    for part in ("up", "down"):
        for candidate in fits:
            tiles = Tiles(candidate.up, best.down) if part == "up" else Tiles(best.up, candidate.down)
            own = _milliseconds(run, tiles) if tiles != best else math.inf
            if own < shortest:
                best, shortest = tiles, own
    return best


def programs(rows: int, columns: int, num_experts: int, tile: Tile, device: torch.device) -> int:
    """Programs of the persistent grid: so many a multiprocessor, but no more than there can be tiles."""
    most = (blocks(rows, tile.rows) + min(rows, num_experts)) * blocks(columns, tile.columns)
    if INTERPRETED:
        return min(most, 2)
    return min(most, tile.per_sm * int(torch.cuda.get_device_properties(device).multi_processor_count))


def can_describe(weight: Tensor) -> bool:
    """Whether the tensor memory accelerator can read [E, N, K] weights: row-major, in steps of 16 bytes."""
    aligned = weight.data_ptr() % 16 == 0 and weight.shape[-1] * weight.itemsize % 16 == 0
    return aligned and weight.is_contiguous() and weight.dtype != torch.float32


def described(weight: Tensor, tile: Tile) -> TensorDescriptor:
    """[E, N, K] weights as [E * N, K] for the tensor memory accelerator, which fills with zeros past column K."""
    return TensorDescriptor.from_tensor(weight.flatten(0, 1), [tile.columns, tile.depth])


def _milliseconds(run: Callable[[Tiles], object], tiles: Tiles) -> float:
    """Median over a few launches; infinite when the tile does not fit the device's shared memory."""
    from triton.runtime.errors import OutOfResources

    try:
        run(tiles)  # compiles
    except OutOfResources:
        return math.inf
    times: list[float] = []
    for _ in range(_REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run(tiles)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)
