"""Prove a block: routing and routed sum are searched for on its tape, what lies around them becomes a recipe.

The recipe must give what the block gives on both calls, on other data, and on crowded tokens, where limits show; and
every expert must enter with the weight that was found (`factors`).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import islice

from torch import nn

from moeca_fx.discover.calls import changed, crowded
from moeca_fx.discover.inline.block import Block, replay_error
from moeca_fx.discover.inline.factors import check_factors
from moeca_fx.discover.inline.match import Experts, Match
from moeca_fx.discover.inline.recipe import make_recipe
from moeca_fx.discover.inline.recorded import NO_MATCH, Recorded
from moeca_fx.discover.inline.tape import NotReplayable, Tape
from moeca_fx.discover.scales import OffScale
from moeca_fx.reasons import Reason

_TRIED = 12  # hypotheses that are made into recipes and run


def prove_block(
    recorded: Recorded,
    make: Callable[[], Sequence[nn.Module]],
    together: Experts,
    dropped: bool,
    off: OffScale | None = None,
) -> Block:
    """Find and prove the routed experts of a block.

    Args:
        recorded: its calls.
        make: gives one module an expert, in order of expert id, those without parameters too.
        together: the same experts.
        dropped: whether to look for branches that are dropped beyond a capacity; they are not found otherwise.
        off: what another reading of the same block was refused for; then every expert's factor must be well known.

    Raises:
        NotReplayable: with the reason.
        OffScale: it is the sum but for one expert's factor.
    """
    short, small = recorded.short, recorded.small
    problem = NotReplayable(NO_MATCH, Reason.ROUTING_UNKNOWN)
    is_part = cache(recorded.needs_experts_beside)
    found = (match for match in recorded.search.matches(together, dropped) if not is_part(match.total))
    for match in islice(found, _TRIED):
        try:
            experts = make()
            block = _block(match, short, recorded.long, experts)
            calls = (small, recorded.large, changed(small), crowded(small), *recorded.more)
            error = max(replay_error(block, recorded.owner, experts, call) for call in calls)
            check_factors(block, recorded, experts, off is not None)
        except OffScale as reason:
            off = off or reason
            continue
        except NotReplayable as reason:
            problem = reason
            continue
        except (RuntimeError, ValueError, IndexError) as reason:  # sizes that fit one call and not another
            problem = NotReplayable(f"its replay fails: {reason}", Reason.REPLAY_FAILS)
            continue
        return replace(block, error=error)
    raise off or problem


def _block(match: Match, short: Tape, long: Tape, experts: Sequence[nn.Module]) -> Block:
    routing = match.routing
    wanted = [match.x, *routing.values, *([match.rest] if match.rest is not None else [])]
    recipe = make_recipe(short, long, wanted, match.total)
    value = short.values[match.total]
    free = tuple(index for index, expert in enumerate(experts) if next(expert.parameters(), None) is None)
    if free and routing.kind == "choice":
        raise NotReplayable(
            "its experts choose tokens, and some of them have no parameters", Reason.FREE_EXPERTS_CHOOSE
        )
    return Block(match, recipe, tuple(value.shape[1:]), value.dtype, free, len(experts), 0.0)
