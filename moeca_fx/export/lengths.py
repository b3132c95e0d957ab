"""Lengths of lists that a graph takes as an input: what to give it, from what its last steps needed.

    lengths [L] int64  -->  graph  -->  needed [L] int64

A step is right where every list was given at least what it needed. Decisions of neighbouring steps are alike, so a step
is given a little more than the last of its kind needed; where that is too little it runs again, with more.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

LENGTHS, NEEDED = "lengths", "needed"
ListKind = Literal["rows", "queries", "group"]
"""Refreshed tokens of a batch; those of the fullest sample; the branches of the fullest expert."""

_ROOM = 1.25  # over what was needed last
_ATTEMPTS = 4  # behind a list that is too short everything is guesswork, so one more attempt may not do


@dataclass(frozen=True)
class GivenList:
    """A list whose length a graph is given.

    Attributes:
        name: module path and stage that it belongs to.
        kind: what it lists.
        tokens: T; top_k, experts: of groups, 1 otherwise.
    """

    name: str
    kind: ListKind
    tokens: int
    top_k: int = 1
    experts: int = 1

    def most(self, batch: int) -> int:
        """Its greatest length."""
        return self.tokens if self.kind == "queries" else self.tokens * self.top_k * batch

    def first(self, batch: int) -> int:
        """Its length before anything is known: all tokens, or twice an even share of all branches."""
        return self.most(batch) if self.kind != "group" else math.ceil(2 * self.most(batch) / self.experts)


class Lengths:
    """What the steps of one graph are given.

    Attributes:
        lists: in the order of the input.
        repeated: how many runs were thrown away because a list was too short.
    """

    def __init__(self, lists: Sequence[GivenList]) -> None:
        self.lists = tuple(lists)
        self.repeated = 0
        self._last: dict[tuple[str, int], list[int]] = {}  # (step, batch) -> needed

    def attempts(self, step: str, batch: int) -> Iterator[Tensor]:
        """Lengths [L] int64 to run a step with, until `enough` says so; the last are all entries."""
        most = [each.most(batch) for each in self.lists]
        for attempt in range(_ATTEMPTS):
            needed = self._last.get((step, batch))
            if needed is None:
                given = [each.first(batch) for each in self.lists]
            else:
                given = [math.ceil(_ROOM * length) for length in needed]
            self.repeated += attempt > 0
            yield torch.tensor([min(pair) for pair in zip(given, most, strict=True)])
        self.repeated += 1
        yield torch.tensor(most)

    def enough(self, step: str, batch: int, given: Tensor, needed: Tensor) -> bool:
        """Whether every list was long enough; remembers what was needed."""
        wanted = needed.tolist()
        fits = all(length <= room for length, room in zip(wanted, given.tolist(), strict=True))
        if not fits:  # what an attempt saw behind a list that was too short may be less than what will be needed
            before = self._last.get((step, batch), wanted)
            wanted = [max(pair) for pair in zip(before, wanted, strict=True)]
        self._last[step, batch] = wanted
        return fits


def describe_lists(lists: Sequence[GivenList]) -> list[dict[str, Any]]:
    """Lists as a manifest describes them."""
    return [asdict(each) for each in lists]


def read_lists(items: Sequence[Mapping[str, Any]]) -> list[GivenList]:
    """The lists that a manifest describes."""
    return [GivenList(**item) for item in items]
