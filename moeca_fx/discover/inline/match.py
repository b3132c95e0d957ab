"""Find on a tape what the experts read, how tokens are routed, and where the routed sum enters the result.

    F = sum over experts of weight * expert(x)       for every value x of token rows and every routing
    V = F, or V = F + U                              for values V and U of the tape (a shared expert, the residual)

All combinations are compared on a few tokens and channels; names and the way the model dispatches play no part. What is
found is only a hypothesis: `block` runs the recipe made from it.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from moeca_fx.autocast import computed_in
from moeca_fx.discover.inline.nearest import Nearest
from moeca_fx.discover.inline.routings import Routing, Shares, find_routings
from moeca_fx.discover.inline.sampled import Outputs, spread
from moeca_fx.discover.inline.tape import Ref, Tape, from_data

_TOKENS, _CHANNELS = 12, 24  # that hypotheses are compared on
_PROJECTIONS, _AT_ONCE = 8, 4_000_000
# Values with as many rows as no argument and no result has: a loop over 128 experts leaves hundreds, one an expert.
_OTHER_ROWS = 12
# Largest difference on those, relative to the routed sum: only to sort out, the proof comes later.
_NEAR = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class Experts(Protocol):
    """Something that runs every expert on the same rows."""

    @property
    def count(self) -> int:
        """E."""

    def outputs(self, rows: Tensor, most: int) -> Outputs | None:
        """Of rows [J, H], on at most `most` channels; None when the experts cannot take such rows."""


@dataclass(frozen=True)
class Match:
    """A hypothesis.

    Attributes:
        x: value of the token rows.
        routing: how they are routed.
        total: value that the routed sum enters.
        rest: value that `total` holds besides; None when it is the sum alone.
    """

    x: int
    routing: Routing
    total: int
    rest: int | None


@dataclass
class Search:
    """The values of one tape, prepared for many hypotheses.

    Attributes:
        tape: of a call of the block.
        samples: batch size of the call.
        seen: rows that experts were called with; only token rows among which they are come into question.
        after: values that the experts have a part in: the routed sum is one of them, nothing else that is looked for.
        nearest: remembers the hypothesis that came nearest; None when nobody asks.
    """

    tape: Tape
    samples: int
    seen: Sequence[Tensor]
    after: frozenset[int]
    shares: dict[tuple[int, int, bool], Shares] = field(default_factory=dict)
    sums: dict[tuple[int, int], "Sums"] = field(default_factory=dict)
    rows: list[tuple[int, Tensor]] | None = None
    few: dict[int, Tensor] = field(default_factory=dict)  # compared rows by value: one tensor for all that reads them
    nearest: Nearest | None = None

    @property
    def before(self) -> dict[int, Tensor]:
        """Values that do not depend on the experts."""
        return {n: value for n, value in sorted(self.tape.values.items()) if n not in self.after}

    def matches(self, experts: Experts, dropped: bool) -> Iterator[Match]:
        """Every hypothesis that holds on the compared tokens, simplest first.

        Args:
            experts: what may be routed to.
            dropped: only with branches that are dropped beyond a capacity, else only without.
        """
        for x, rows in self._rows():
            shares = self._shares(len(rows), experts.count, dropped)
            if not shares.routings:
                continue  # before the experts are run: that reads all of their weights
            chosen = spread(len(rows), _TOKENS)
            outputs = experts.outputs(self.few.setdefault(x, rows[chosen]), _CHANNELS)
            if outputs is not None:
                yield from self._with(shares, x, rows, chosen, outputs)

    def may_route(self, count: int) -> bool:
        """Whether any values have the form of a routing over `count` experts: else no expert need be run."""
        return any(self._shares(len(rows), count, False).possible for _, rows in self._rows())

    def _rows(self) -> list[tuple[int, Tensor]]:
        """Values that may be the experts' input."""
        if self.rows is None:
            moving = from_data(self.tape)
            values = {number: value for number, value in self.before.items() if number in moving}
            self.rows = _likely(self.tape, list(_token_rows(values, self.seen)))
        return self.rows

    def _shares(self, tokens: int, count: int, dropped: bool) -> Shares:
        key = (tokens, count, dropped)
        if key not in self.shares:
            chosen = spread(tokens, _TOKENS)
            self.shares[key] = find_routings(self.tape, self.before, count, tokens, self.samples, chosen, dropped)
        return self.shares[key]

    def _with(self, shares: Shares, x: int, rows: Tensor, chosen: Tensor, outputs: Outputs) -> Iterator[Match]:
        tokens, width = len(rows), outputs.width
        if (tokens, width) not in self.sums:
            self.sums[tokens, width] = Sums(self.tape, self.after, tokens, width, chosen)
        channels = spread(width, _CHANNELS)
        none = torch.zeros(len(chosen), len(channels), dtype=torch.float64)
        own = rows[chosen][:, channels].double() if rows.shape[-1] == width else none
        parts = torch.cat([outputs.parts.double(), own[:, None]], 1)  # [J, E + 1, c]
        routed = torch.einsum("rje,jec->rjc", shares.weights, parts)
        limit = _NEAR.get(computed_in(rows.dtype), 0.0)
        if self.nearest is not None:
            self.nearest.look(self, self.sums[tokens, width], shares, x, routed, chosen, limit)
        for index, total, rest in self.sums[tokens, width].holding(routed, limit):
            yield Match(x, shares.routings[index], total, rest)


def _token_rows(values: Mapping[int, Tensor], seen: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Different values that may be the experts' input [N, H], in the order of the tape."""
    known: list[Tensor] = []
    wanted = [part[0] for part in seen if part.dim() == 2 and part.shape[0] and bool((part[0] != 0).any())]
    for number, value in values.items():
        if not _floats(value) or value.dim() < 2:
            continue
        rows = value.reshape(-1, value.shape[-1])
        if not all(_holds(rows, row) for row in wanted[:4]):
            continue
        if any(rows.shape == other.shape and torch.equal(rows, other) for other in known):
            continue
        known.append(rows)
        yield number, rows


def _likely(tape: Tape, found: list[tuple[int, Tensor]]) -> list[tuple[int, Tensor]]:
    """All with as many rows as an argument or a result of the call; of the others the first, if they are few alike."""
    ends = [number for number, source in tape.sources.items() if source.kind == "input"]
    ends += [leaf.number for leaf in tape.outputs if isinstance(leaf, Ref)]
    values = [tape.values[number] for number in ends if number in tape.values]
    counts = {value.numel() // value.shape[-1] for value in values if value.dim() > 1 and value.numel()}
    alike = Counter(len(rows) for _, rows in found)
    others = [n for n, rows in found if len(rows) not in counts and alike[len(rows)] <= _OTHER_ROWS][:_OTHER_ROWS]
    return [(number, rows) for number, rows in found if len(rows) in counts or number in others]


def _floats(value: Tensor) -> bool:
    return value.is_floating_point() and value.numel() > 1 and not value.is_inference()


def _holds(rows: Tensor, row: Tensor) -> bool:
    return rows.shape[-1] == row.shape[-1] and bool((rows == row).all(-1).any())


class Sums:
    """Values of the tape that may hold the routed sum [N, H]."""

    def __init__(self, tape: Tape, after: frozenset[int], tokens: int, width: int, chosen: Tensor) -> None:
        self.numbers: list[int] = []
        parts = []
        channels = spread(width, _CHANNELS)
        for number in sorted(tape.values):
            value = tape.values[number]
            if _floats(value) and value.dim() > 1 and value.shape[-1] == width and value.numel() == tokens * width:
                self.numbers.append(number)
                parts.append(value.reshape(-1, width)[chosen][:, channels].double())
        none = torch.zeros(0, len(chosen), len(channels), dtype=torch.float64)
        self.parts = torch.stack(parts) if parts else none  # [C, J, c]
        self.totals = torch.tensor([index for index, n in enumerate(self.numbers) if n in after], dtype=torch.long)
        self.rests = torch.tensor([index for index, n in enumerate(self.numbers) if n not in after], dtype=torch.long)
        generator = torch.Generator().manual_seed(0)
        shape = (len(chosen) * len(channels), _PROJECTIONS)
        self.directions = torch.randn(shape, generator=generator, dtype=torch.float64) / shape[0] ** 0.5

    def holding(self, routed: Tensor, limit: float) -> Iterator[tuple[int, int, int | None]]:
        """(index of a sum, value, other): value equals the sum, or the sum and the other value together.

        Args:
            routed: sums [R, J, c].
            limit: largest difference relative to the sum.
        """
        if not len(self.totals) or not len(routed):
            return
        size = routed.abs().amax((1, 2))  # [R]
        near = torch.where((size > 0) & torch.isfinite(size), limit * size, -1.0)
        seen_at, routed_at = self.parts.flatten(1) @ self.directions, routed.flatten(1) @ self.directions  # [.., p]
        totals, rests = seen_at[self.totals], seen_at[self.rests]
        apart = (totals[None] - routed_at[:, None]).abs().amax(-1)  # [R, V]
        for index, place in torch.nonzero(apart <= 4 * near[:, None]).tolist():
            value = int(self.totals[place])
            if float((self.parts[value] - routed[index]).abs().max()) <= float(near[index]):
                yield index, self.numbers[value], None
        scale = self.parts.abs().amax((1, 2))
        each = max(1, _AT_ONCE // max(1, len(totals) * len(rests) * _PROJECTIONS))
        for begin in range(0, len(routed), each):
            left = totals[None] - routed_at[begin : begin + each, None]  # [r, V, p]
            apart = (left[:, :, None] - rests[None, None]).abs().amax(-1)  # [r, V, U]
            for offset, place, other in torch.nonzero(apart <= 4 * near[begin : begin + each, None, None]).tolist():
                index, value, rest = begin + offset, int(self.totals[place]), int(self.rests[other])
                if not float(size[index]) > 1e-3 * float(scale[value]):
                    continue  # too small a part of that value to be told from rounding
                difference = self.parts[value] - routed[index] - self.parts[rest]
                if float(difference.abs().max()) <= float(near[index]):
                    yield index, self.numbers[value], self.numbers[rest]
