"""The hypothesis that came nearest to what a block computes, when none held: the first thing to look at.

rows: input 0; 2 expert ids and weights a token; ..     differs by 1.0e-02 of the sum on tokens 3, 7: those of expert 2

Looked for only when asked (`moeca_fx.doctor`): `match` compares, this ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moeca_fx.discover.inline.routings import Shares

if TYPE_CHECKING:
    from moeca_fx.discover.inline.match import Search, Sums

_AT_ONCE = 4_000_000
_SHOWN = 6
FAR = 0.5  # beyond this share of the sum, the nearest is so by chance


@dataclass(frozen=True)
class NearMiss:
    """A hypothesis that does not hold.

    Attributes:
        what: rows, routing, weights and what is added, in words.
        error: largest difference on the compared tokens and channels, relative to the routed sum.
        allowed: what would have been taken.
        compared: tokens that were compared.
        tokens: those on which it differs.
        experts: experts that every such token goes to and no other one.
    """

    what: str
    error: float
    allowed: float
    compared: int
    tokens: tuple[int, ...]
    experts: tuple[int, ...]

    def __str__(self) -> str:
        shown = ", ".join(str(token) for token in self.tokens[:_SHOWN])
        more = ", .." if len(self.tokens) > _SHOWN else ""
        whose = f": those of expert {', '.join(map(str, self.experts))}" if self.experts else ""
        return (
            f"{self.what}. It differs by {self.error:.1e} of the routed sum (allowed {self.allowed:.0e}) on "
            f"{len(self.tokens)} of {self.compared} compared tokens ({shown}{more}){whose}"
        )


class Nearest:
    """Keeps the nearest of all hypotheses that it is shown."""

    def __init__(self) -> None:
        self.miss: NearMiss | None = None

    def look(
        self, search: "Search", sums: "Sums", shares: Shares, x: int, routed: Tensor, chosen: Tensor, limit: float
    ) -> None:
        """Compare all of them.

        Args:
            search, sums: the tape and its values on the compared tokens.
            shares: routings.
            x: value of the rows.
            routed: sum of every routing [R, J, c].
            chosen: tokens that are compared [J].
            limit: what is taken, relative to the sum.
        """
        for error, index, place, other in _distances(sums, routed):
            if error < min(FAR, FAR if self.miss is None else self.miss.error):
                self._keep(search, sums, shares, x, routed, chosen, limit, index, place, other)

    def _keep(
        self,
        search: "Search",
        sums: "Sums",
        shares: Shares,
        x: int,
        routed: Tensor,
        chosen: Tensor,
        limit: float,
        index: int,
        place: int,
        other: int | None,
    ) -> None:
        from moeca_fx.discover.inline.match import Match
        from moeca_fx.discover.inline.words import match_in_words

        left = sums.parts[place] - routed[index] - (0 if other is None else sums.parts[other])
        size = float(routed[index].abs().max())
        error = float(left.abs().max()) / size
        if not limit < error < (FAR if self.miss is None else self.miss.error):
            return  # one that holds was tried, and failed for another reason
        apart = left.abs().amax(-1) > limit * size  # [J]
        active = shares.weights[index, :, :-1] != 0  # [J, E]
        own = (active == apart[:, None]).all(0)
        rest = None if other is None else sums.numbers[other]
        match = Match(x, shares.routings[index], sums.numbers[place], rest)
        self.miss = NearMiss(
            match_in_words(match, search.tape.sources, search.tape.entries),
            error,
            limit,
            len(chosen),
            tuple(chosen[apart].tolist()),
            tuple(torch.nonzero(own).flatten().tolist()),
        )


def _distances(sums: "Sums", routed: Tensor) -> Iterator[tuple[float, int, int, int | None]]:
    """(about how far, routing, value, value added to the sum) of the nearest ones."""
    if not len(sums.totals) or not len(routed):
        return
    size = routed.abs().amax((1, 2))  # [R]
    size = torch.where((size > 0) & torch.isfinite(size), size, float("nan"))
    seen, found = sums.parts.flatten(1) @ sums.directions, routed.flatten(1) @ sums.directions
    totals, rests = seen[sums.totals], seen[sums.rests]
    scale = sums.parts.abs().amax((1, 2))[sums.totals]  # [V]
    alone = (totals[None] - found[:, None]).abs().amax(-1) / size[:, None]  # [R, V]
    yield from ((e, r, int(sums.totals[v]), None) for e, (r, v) in _least(alone))
    each = max(1, _AT_ONCE // max(1, len(totals) * len(rests) * found.shape[-1]))
    for begin in range(0, len(routed) if len(rests) else 0, each):
        part, own = found[begin : begin + each], size[begin : begin + each, None, None]
        left = totals[None] - part[:, None]  # [r, V, p]
        apart = (left[:, :, None] - rests[None, None]).abs().amax(-1) / own  # [r, V, U]
        small = own <= 1e-3 * scale[None, :, None]  # too small a part of that value to be told from rounding
        apart = apart.masked_fill(small, float("nan"))
        for error, (r, v, u) in _least(apart):
            yield error, begin + r, int(sums.totals[v]), int(sums.rests[u])


def _least(values: Tensor) -> Iterator[tuple[float, tuple[int, ...]]]:
    """The least of these with its place; NaN counts as none."""
    filled = values.nan_to_num(nan=float("inf"), posinf=float("inf"))
    if filled.numel():
        place = int(filled.argmin())
        yield (
            float(filled.flatten()[place]),
            tuple(int(i) for i in torch.unravel_index(torch.tensor(place), filled.shape)),
        )
