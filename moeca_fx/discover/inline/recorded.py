"""A block's calls in two runs of the model, of different batch sizes, with their tapes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moeca_fx.discover.calls import Call
from moeca_fx.discover.inline.block import NOT_FINITE
from moeca_fx.discover.inline.match import Search
from moeca_fx.discover.inline.nearest import Nearest
from moeca_fx.discover.inline.tape import NotReplayable, Ref, Tape, depends_on, record
from moeca_fx.reasons import Reason

NO_MATCH = "no values of its run are token rows, a routing over its experts, and their weighted sum"


@dataclass(frozen=True)
class Recorded:
    """A block's calls in two runs of the model, of different batch sizes, and their tapes.

    Attributes:
        owner: module of the calls.
        small, large: their arguments.
        short, long: their tapes.
        search: over the first tape.
        opened, paths, states: as for `record_block`.
        more: arguments of other calls, which must be explained too.
    """

    owner: nn.Module
    small: Call
    large: Call
    short: Tape
    long: Tape
    search: Search
    opened: frozenset[str]
    paths: frozenset[str]
    states: frozenset[str]
    more: Sequence[Call] = ()

    def needs_experts_beside(self, total: int) -> bool:
        """Whether the result needs an expert in another way than through the value `total`.

        Then that is a part of the routed sum, and equals all of it where the other experts have no tokens.
        """
        makers = {number: entry for entry in self.short.entries for number in entry.outputs if number is not None}
        experts = {
            n for n, source in self.short.sources.items() if source.kind == "state" and source.key in self.states
        }
        stack, seen = [leaf.number for leaf in self.short.outputs if isinstance(leaf, Ref)], {total}
        while stack:
            number = stack.pop()
            if number in experts or (number in makers and number not in seen and makers[number].target in self.paths):
                return True
            if number in makers and number not in seen:
                stack += makers[number].reads()
            seen.add(number)
        return False


def record_block(
    owner: nn.Module,
    opened: frozenset[str],
    small: Call,
    large: Call,
    paths: Sequence[str] = (),
    states: Sequence[str] = (),
    nearest: Nearest | None = None,
    stacked: int = 0,
) -> Recorded:
    """Run a block on both calls; on the first alone where nothing in it can route to stacked experts.

    Args:
        owner: module of the calls.
        opened: paths of its submodules on the way to the experts, and of none else.
        small, large: arguments.
        paths: of the experts below the owner; none for stacked ones.
        states: paths below the owner of the parameters that stack experts.
        nearest: remembers the hypothesis that came nearest.
        stacked: how many experts are stacked; 0 for modules, where rows that they were called with decide.

    Raises:
        NotReplayable: it cannot be recorded, returns NaN or infinity, or holds nothing that could route.
    """
    short = record(owner, opened, small.args, small.kwargs)
    results = [short.values.get(leaf.number) for leaf in short.outputs if isinstance(leaf, Ref)]
    if not all(bool(torch.isfinite(value).all()) for value in results if value is not None):
        # NaN equals nothing: the search would hold every value for another one
        raise NotReplayable(NOT_FINITE, Reason.NOT_FINITE)
    below = frozenset(paths), frozenset(states)
    search = Search(short, small.samples, _rows_seen(short, paths), depends_on(short, *below), nearest=nearest)
    if stacked and not search.may_route(stacked):
        raise NotReplayable(NO_MATCH, Reason.ROUTING_UNKNOWN)  # before more runs: its router is further out
    long = record(owner, opened, large.args, large.kwargs)
    return Recorded(owner, small, large, short, long, search, opened, *below)


def _rows_seen(tape: Tape, paths: Sequence[str]) -> list[Tensor]:
    """Rows that experts read."""
    found = []
    for entry in tape.entries:
        if entry.is_module and entry.target in paths:
            leaves = [tape.values.get(number) for number in entry.reads()]
            found += [leaf.reshape(-1, leaf.shape[-1]) for leaf in leaves if leaf is not None and leaf.dim()]
    return found
