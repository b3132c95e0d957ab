"""A block: a call whose router, dispatch and experts are written into one method, and how to replay it.

    forward(x):                                            forward(x):
      ids, w = topk(softmax(gate(x)))                        ids, w = topk(softmax(gate(x)))
      for e, expert in enumerate(experts): ...       -->     y = experts(x, ids, w)              the marker
      return y + shared(x)                                   return y + shared(x)

What was found on its tape (`match`) and what lies around that (`recipe`) are all it takes; `proof` makes blocks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from moeca_fx.autocast import Autocast
from moeca_fx.discover.calls import Call
from moeca_fx.discover.inline.branches import COPY, Branches, branches_of, may_be_empty
from moeca_fx.discover.inline.match import Match
from moeca_fx.discover.inline.recipe import Recipe
from moeca_fx.discover.inline.tape import NotReplayable
from moeca_fx.discover.reference import branch_sum, choice_as_tokens, tolerance_of
from moeca_fx.reasons import Reason

NOT_FINITE = "it returned NaN or infinity; check the weights and the example inputs"

Marker = Callable[[Tensor, Tensor, Tensor], Tensor]


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

    def _wide(self, rows: Tensor) -> Tensor:
        """Rows in the dtype of their sum where autocast makes that wider: a marker's sum has its rows' dtype."""
        return rows.to(torch.promote_types(rows.dtype, self.dtype)) if Autocast.now().dtypes else rows

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
            total = marker(self._wide(values[0]), branches.chosen, branches.weight)
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


def reference_marker(experts: Sequence[nn.Module], free: Sequence[int], choice: bool) -> Marker:
    """The routed sum computed expert by expert."""
    real = [expert for index, expert in enumerate(experts) if index not in free]

    def marker(x: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
        ids, share = choice_as_tokens(x, chosen, weight) if choice else (chosen, weight)
        return branch_sum(real, x, ids, share).reshape(x.shape).to(x.dtype)

    return marker


def replay_error(
    block: Block,
    owner: nn.Module,
    experts: Sequence[nn.Module],
    call: Call,
    seen: Callable[[list[Tensor], Tensor], None] | None = None,
) -> float:
    """Largest difference between a block's call and its replay, relative to each result; `seen` as for `Block.run`.

    Raises:
        NotReplayable: it is larger than rounding may be.
    """
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        want = owner.forward(*call.args, **call.kwargs)
        marker = reference_marker(experts, block.free, block.match.routing.kind == "choice")
        error = largest_difference(want, block.run(owner, experts, marker, call.args, call.kwargs, seen))
    if error > tolerance_of(block.dtype):
        raise NotReplayable(f"its replay differs from it by {error:.1e} relative", Reason.REPLAY_DIFFERS)
    return error


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
                raise NotReplayable(NOT_FINITE, Reason.NOT_FINITE)
            difference = (a.double() - b.double()).abs().max()
            worst = max(worst, float(difference / a.abs().max().double().clamp_min(1e-30)))
        elif a != b:
            raise NotReplayable(f"its replay gives {b!r} where it gives {a!r}", Reason.REPLAY_DIFFERS)
    return worst
