"""Prove a whole block: a call whose router, dispatch and experts are written into one method.

    forward(x):                                            forward(x):
      ids, w = topk(softmax(gate(x)))                        ids, w = topk(softmax(gate(x)))
      for e, expert in enumerate(experts): ...       -->     y = experts(x, ids, w)              the marker
      return y + shared(x)                                   return y + shared(x)

The call is recorded at two batch sizes (`tape`), routing and routed sum are searched for on it (`match`), what lies
around them becomes a recipe, and the recipe must give what the block gives, on other data too.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from moeca_fx.batch import other_values
from moeca_fx.discover.inline.branches import COPY, Branches, branches_of, may_be_empty
from moeca_fx.discover.inline.match import Experts, Match, Search
from moeca_fx.discover.inline.nearest import Nearest
from moeca_fx.discover.inline.recipe import Recipe, make_recipe
from moeca_fx.discover.inline.tape import NotReplayable, Ref, Tape, depends_on, record
from moeca_fx.discover.reference import TOLERANCE, branch_sum, choice_as_tokens
from moeca_fx.discover.scales import OffScale, Sample, check_scales
from moeca_fx.reasons import Reason

NO_MATCH = "no values of its run are token rows, a routing over its experts, and their weighted sum"
_APART = 0.02  # what is left of the differences between tokens in a crowded call
_NOT_FINITE = "it returned NaN or infinity; check the weights and the example inputs"
_TRIED = 12  # hypotheses that are made into recipes and run
_MORE_CALLS = 6  # of a block, at most, where two do not show every expert's factor

Marker = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Call:
    """Arguments of one call of a module."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    samples: int


@dataclass(frozen=True)
class Block:
    """A proven block.

    Attributes:
        match: what was found on the tape.
        recipe: how to compute the call around the routed experts.
        shape: of the value that holds the routed sum, without its leading size.
        dtype: of that value.
        free: ids of experts without parameters.
        count: number of all experts.
        error: of the proof, relative to the largest output.
    """

    match: Match
    recipe: Recipe
    shape: tuple[int, ...]
    dtype: torch.dtype
    free: tuple[int, ...]
    count: int
    error: float

    @property
    def empty_slots(self) -> bool:
        """Whether a token may have fewer branches than slots."""
        return may_be_empty(self.match.routing, self.free)

    def branches(self, values: Sequence[Tensor]) -> Branches:
        """Branches of a call, from the token rows and the values of the routing."""
        return branches_of(self.match.routing, values[0], values[1:], self.free, self.count)

    def free_part(self, x: Tensor, branches: Branches, experts: Sequence[nn.Module]) -> Tensor | None:
        """What experts without parameters add to the sum; None when there are none."""
        parts = [(x if index == COPY else experts[index](x)) * share for index, share in branches.free]
        return None if not parts else torch.stack(parts).sum(0)

    def run(
        self,
        owner: nn.Module,
        experts: Sequence[nn.Module],
        marker: Marker,
        args: tuple[Any, ...],
        kwargs: Any,
        seen: Callable[[list[Tensor], Tensor], None] | None = None,
    ) -> Any:
        """The call's result, the experts with parameters computed by `marker` (rows, ids or tokens, weights).

        `seen`, where given, is told what the experts took and the value that the routed sum entered.
        """

        def routed(*values: Tensor) -> Tensor:
            rest = values[-1] if self.match.rest is not None else None
            branches = self.branches(values if rest is None else values[:-1])
            total = marker(values[0], branches.chosen, branches.weight)
            free = self.free_part(values[0], branches, experts)
            total = total if free is None else total + free.to(total.dtype)
            total = total.reshape(-1, *self.shape)
            result = total.to(self.dtype) if rest is None else _plus(rest, total).to(self.dtype)
            if seen is not None:
                seen(list(values), result)
            return result

        return self.recipe.run(owner, routed, args, kwargs)


def _plus(rest: Tensor, total: Tensor) -> Tensor:
    return rest.reshape(total.shape) + total.to(rest.dtype)


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


def record_block(
    owner: nn.Module,
    opened: frozenset[str],
    small: Call,
    large: Call,
    paths: Sequence[str] = (),
    states: Sequence[str] = (),
    nearest: Nearest | None = None,
) -> Recorded:
    """Run a block on both calls.

    Args:
        owner: module of the calls.
        opened: paths of its submodules on the way to the experts, and of none else.
        small, large: arguments.
        paths: of the experts below the owner; none for stacked ones.
        states: paths below the owner of the parameters that stack experts.
        nearest: remembers the hypothesis that came nearest.

    Raises:
        NotReplayable: it cannot be recorded, or returns NaN or infinity.
    """
    short, long = (record(owner, opened, call.args, call.kwargs) for call in (small, large))
    results = [short.values.get(leaf.number) for leaf in short.outputs if isinstance(leaf, Ref)]
    if not all(bool(torch.isfinite(value).all()) for value in results if value is not None):
        # NaN equals nothing: the search would hold every value for another one
        raise NotReplayable(_NOT_FINITE, Reason.NOT_FINITE)
    below = frozenset(paths), frozenset(states)
    search = Search(short, small.samples, _rows_seen(short, paths), depends_on(short, *below), nearest=nearest)
    return Recorded(owner, small, large, short, long, search, opened, *below)


def prove_block(
    recorded: Recorded, experts: Sequence[nn.Module], together: Experts, dropped: bool, off: OffScale | None = None
) -> Block:
    """Find and prove the routed experts of a block.

    Args:
        recorded: its calls.
        experts: one module an expert, in order of expert id, those without parameters too.
        together: the same experts.
        dropped: whether to look for branches that are dropped beyond a capacity; they are not found otherwise.
        off: what another reading of the same block was refused for; then every expert's factor must be well known.

    Raises:
        NotReplayable: with the reason.
        OffScale: it is the sum but for one expert's factor.
    """
    short, small = recorded.short, recorded.small
    problem = NotReplayable(NO_MATCH, Reason.ROUTING_UNKNOWN)
    for match in islice(recorded.search.matches(together, dropped), _TRIED):
        try:
            block = _block(match, short, recorded.long, experts)
            calls = (small, recorded.large, changed(small), crowded(small), *recorded.more)
            error = max(_error(block, recorded.owner, experts, call) for call in calls)
            if error > TOLERANCE.get(block.dtype, 0.0):
                raise NotReplayable(f"its replay differs from it by {error:.1e} relative", Reason.REPLAY_DIFFERS)
            _check_scales(block, recorded, experts, off is not None)
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


def _rows_seen(tape: Tape, paths: Sequence[str]) -> list[Tensor]:
    """Rows that experts read."""
    found = []
    for entry in tape.entries:
        if entry.is_module and entry.target in paths:
            leaves = [tape.values.get(number) for number in entry.reads()]
            found += [leaf.reshape(-1, leaf.shape[-1]) for leaf in leaves if leaf is not None and leaf.dim()]
    return found


def changed(call: Call) -> Call:
    """The same shapes, other data."""
    args, kwargs = pytree.tree_map(other_values, (call.args, dict(call.kwargs)))
    return Call(args, kwargs, call.samples)


def crowded(call: Call) -> Call:
    """Nearly the same token everywhere: all of them ask for the same experts, so that every limit shows."""

    def crowd(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.dim() < 2 or not leaf.numel():
            return leaf
        rows = leaf.reshape(-1, leaf.shape[-1])
        return (rows[:1] + (rows - rows[:1]) * _APART).to(leaf.dtype).view(leaf.shape)

    args, kwargs = pytree.tree_map(crowd, (call.args, dict(call.kwargs)))
    return Call(args, kwargs, call.samples)


def reference_marker(experts: Sequence[nn.Module], free: Sequence[int], choice: bool) -> Marker:
    """The routed sum computed expert by expert."""
    real = [expert for index, expert in enumerate(experts) if index not in free]

    def marker(x: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
        ids, share = choice_as_tokens(x, chosen, weight) if choice else (chosen, weight)
        return branch_sum(real, x, ids, share).reshape(x.shape).to(x.dtype)

    return marker


def _error(block: Block, owner: nn.Module, experts: Sequence[nn.Module], call: Call) -> float:
    """Largest difference between the block and its replay, relative to each result."""
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        want = owner.forward(*call.args, **call.kwargs)
        marker = reference_marker(experts, block.free, block.match.routing.kind == "choice")
        return largest_difference(want, block.run(owner, experts, marker, call.args, call.kwargs))


def largest_difference(want: Any, have: Any) -> float:
    """Of two results of one structure, relative to the largest value of each tensor of the first.

    Raises:
        NotReplayable: shapes, types or plain values differ, or the first holds NaN or infinity.
    """
    worst = 0.0
    for a, b in zip(pytree.tree_leaves(want), pytree.tree_leaves(have), strict=True):
        if isinstance(a, Tensor):
            if a.shape != b.shape or a.dtype != b.dtype:
                shapes = f"{tuple(b.shape)} {b.dtype}, it {tuple(a.shape)} {a.dtype}"
                raise NotReplayable(f"its replay gives {shapes}", Reason.REPLAY_DIFFERS)
            if not a.numel():
                continue
            if not bool(torch.isfinite(a).all()):
                raise NotReplayable(_NOT_FINITE, Reason.NOT_FINITE)
            difference = (a.double() - b.double()).abs().max()
            worst = max(worst, float(difference / a.abs().max().double().clamp_min(1e-30)))
        elif a != b:
            raise NotReplayable(f"its replay gives {b!r} where it gives {a!r}", Reason.REPLAY_DIFFERS)
    return worst


def _check_scales(block: Block, recorded: Recorded, experts: Sequence[nn.Module], strict: bool) -> None:
    """Every expert must enter with the weight that was found, to a fraction of a percent.

    Raises:
        OffScale: one does not.
    """
    real = [expert for index, expert in enumerate(experts) if index not in block.free]
    check_scales(real, _samples(block, recorded, experts), strict)


def _samples(block: Block, recorded: Recorded, experts: Sequence[nn.Module]) -> Iterator[Sample]:
    """The first call, the larger one, and more calls of the block on other data."""
    match, values = block.match, recorded.short.values
    rest = values[match.rest] if match.rest is not None else None
    routing = [values[number] for number in match.routing.values]
    yield _sample(block, [values[match.x], *routing], rest, values[match.total], experts)
    yield from _sample_elsewhere(block, recorded, recorded.large, recorded.long, experts)
    for seed in range(_MORE_CALLS):
        call = _redrawn(recorded.small, seed)
        try:
            tape = record(recorded.owner, recorded.opened, call.args, call.kwargs)
        except (NotReplayable, RuntimeError, ValueError, IndexError):  # the block does not take such data
            return
        yield from _sample_elsewhere(block, recorded, call, tape, experts)


def _sample(
    block: Block,
    given: Sequence[Tensor],
    rest: Tensor | None,
    total: Tensor,
    experts: Sequence[nn.Module],
    proven: bool = True,
) -> Sample:
    """What the model made of token rows and the values of a routing (`given`)."""
    x, branches = given[0], block.branches(given)
    ids, weight = branches.chosen, branches.weight
    if block.match.routing.kind == "choice":
        ids, weight = choice_as_tokens(x, ids, weight)
    routed = total.double().reshape(-1, total.shape[-1])
    routed = routed if rest is None else routed - rest.double().reshape(routed.shape)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        free = block.free_part(x, branches, experts)
    routed = routed if free is None else routed - free.double().reshape(routed.shape)
    return Sample(x, ids, weight, routed, total, proven)


def _sample_elsewhere(
    block: Block, recorded: Recorded, call: Call, tape: Tape, experts: Sequence[nn.Module]
) -> Iterator[Sample]:
    """The same of a call whose tape has other numbers: its sum is the value nearest to the replay's."""
    seen: list[tuple[list[Tensor], Tensor]] = []

    def keep(values: list[Tensor], total: Tensor) -> None:
        seen.append((values, total))

    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            marker = reference_marker(experts, block.free, block.match.routing.kind == "choice")
            block.run(recorded.owner, experts, marker, call.args, call.kwargs, keep)
    except (RuntimeError, ValueError, IndexError):
        return
    values, total = seen[0]
    rest = values.pop() if block.match.rest is not None else None
    after = depends_on(tape, recorded.paths, recorded.states)
    sums = [tape.values[number] for number in sorted(after & tape.values.keys())]
    fitting = [value for value in sums if value.dtype == total.dtype and value.numel() == total.numel()]
    fitting = [value for value in fitting if value.shape[-1:] == total.shape[-1:]]
    if fitting:
        rows = total.reshape(-1, total.shape[-1]).double()
        nearest = min(fitting, key=lambda value: float((value.reshape(rows.shape).double() - rows).square().sum()))
        yield _sample(block, values, rest, nearest, experts, proven=False)


def _redrawn(call: Call, seed: int) -> Call:
    """The same shapes, other data: every floating-point argument of several axes with noise of its own size."""
    generator = torch.Generator().manual_seed(seed)

    def change(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.dim() < 2 or not leaf.numel():
            return leaf
        noise = torch.randn(leaf.shape, generator=generator).to(leaf)
        return leaf + noise * leaf.abs().mean()

    args, kwargs = pytree.tree_map(change, (call.args, dict(call.kwargs)))
    return Call(args, kwargs, call.samples)
