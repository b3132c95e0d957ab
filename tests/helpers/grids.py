"""Grids of parameters of which the fast suite runs a few cells, and `make slow` the rest."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest


def slow(*values: Any, id: str | None = None) -> Any:
    """A cell for `make slow`."""
    return pytest.param(*values, marks=pytest.mark.slow, id=id)


def spread(*axes: Sequence[Any]) -> list[Any]:
    """Every combination of the axes' values; the fast ones lie on the diagonal, where each value occurs."""
    cells = {tuple(i % len(axis) for axis in axes) for i in range(max(map(len, axes)))}
    return [
        (pytest.param if place in cells else slow)(*(axis[i] for axis, i in zip(axes, place, strict=True)))
        for place in product(*(range(len(axis)) for axis in axes))
    ]
