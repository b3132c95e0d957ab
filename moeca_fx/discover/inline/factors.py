"""What the calls of a block show of each expert's factor: its own calls first, then calls on other data (`scales`)."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from moeca_fx.discover.calls import Call, redrawn
from moeca_fx.discover.inline.block import Block, replay_error
from moeca_fx.discover.inline.recorded import Recorded
from moeca_fx.discover.inline.tape import NotReplayable, Tape, depends_on, record
from moeca_fx.discover.reference import choice_as_tokens
from moeca_fx.discover.scales import Sample, check_scales

_MORE_CALLS = 6  # of a block, at most, where two do not show every expert's factor


def check_factors(block: Block, recorded: Recorded, experts: Sequence[nn.Module], strict: bool) -> None:
    """Every expert must enter with the weight that was found, to a fraction of a percent.

    Raises:
        OffScale: one does not.
        NotReplayable: on other data the block's replay gives something else.
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
        call = redrawn(recorded.small, seed)
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
    """The same of a call whose tape has other numbers: its sum is the value nearest to the replay's.

    Raises:
        NotReplayable: the replay gives something else; experts that ran in no call before may run in this one.
    """
    seen: list[tuple[list[Tensor], Tensor]] = []

    def keep(values: list[Tensor], total: Tensor) -> None:
        seen.append((values, total))

    replay_error(block, recorded.owner, experts, call, keep)
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
