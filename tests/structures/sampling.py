"""A fixed sample of structures with every pair of values that can go together, and a small one with every value."""

import random
from collections.abc import Iterable
from dataclasses import asdict
from functools import cache
from itertools import combinations
from typing import Any

from tests.structures.structure import AXES, Structure, complete

SIZE = 420
FAST_SIZE = 10
_SEED = 20
_TRIES = 12

Value = tuple[str, Any]
Pair = tuple[Value, Value]


def pairs_of(structure: Structure) -> set[Pair]:
    """Every pair of (axis, value) of a structure, axes in order."""
    return set(combinations(asdict(structure).items(), 2))


@cache
def valid_pairs() -> frozenset[Pair]:
    """Every pair of values that occurs in some valid structure."""
    generator = random.Random(0)
    found: set[Pair] = set()
    for first, second in combinations(AXES, 2):
        for pair in ((((first, a), (second, b))) for a in AXES[first] for b in AXES[second]):
            if pair not in found and (structure := complete(dict(pair), generator)):
                found |= pairs_of(structure)
    return frozenset(found)


@cache
def sample() -> tuple[Structure, ...]:
    """`SIZE` different structures, the same at every call, that hold every valid pair; the first ones hold the most."""
    generator = random.Random(_SEED)
    missing = set(valid_pairs())
    chosen: dict[Structure, None] = {}
    while missing:
        wanted = dict(min(missing, key=repr))
        tries = [found for _ in range(_TRIES) if (found := complete(wanted, generator))]
        best = max(tries, key=lambda structure: len(pairs_of(structure) & missing))
        missing -= pairs_of(best)
        chosen[best] = None
    while len(chosen) < SIZE:
        found = complete({}, generator)
        assert found is not None, "the rules leave some structure"
        chosen[found] = None
    return tuple(chosen)


@cache
def fast_sample() -> tuple[int, ...]:
    """Indices into `sample()` of `FAST_SIZE` structures that hold every single value."""
    structures = sample()
    missing: set[Value] = {(axis, value) for axis, values in AXES.items() for value in values}
    indices: list[int] = []
    while len(indices) < FAST_SIZE:
        rest = [index for index in range(len(structures)) if index not in indices]
        best = max(rest, key=lambda index: (len(missing & _values(structures[index])), -index))
        missing -= _values(structures[best])
        indices.append(best)
    assert not missing, f"{FAST_SIZE} structures do not hold {missing}"
    return tuple(sorted(indices))


def covered(structures: Iterable[Structure]) -> set[Pair]:
    """Pairs that occur in any of these."""
    return set().union(*(pairs_of(structure) for structure in structures))


def _values(structure: Structure) -> set[Value]:
    return set(asdict(structure).items())
