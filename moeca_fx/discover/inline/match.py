"""Find on a tape what the experts read, how tokens are routed, and where the routed sum enters the result.

    x [N, H], expert ids [N, k] and weights [N, k]    or dense weights [N, E], zero where an expert is not chosen
                                                      or tokens [B, E, C] chosen by experts, and their weights
    F = sum over branches of weight * expert(x)
    some value V of the tape equals F, or F + U for another value U (a shared expert, the residual)

All pairs of such values are tried on a few rows; names and the way the model dispatches play no part. What is found is
only a hypothesis: `prove` runs the recipe made from it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from moeca_fx.discover.inline.tape import Ref, Tape

Kind = Literal["ids", "dense", "choice"]
_ROWS = 12  # tokens that hypotheses are compared on
# Largest difference on those rows, relative to the value compared with: only to sort out, the proof comes later.
_NEAR = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Routing:
    """Values of the tape that say which expert takes which token, and with which weight.

    Attributes:
        kind: ``ids`` (expert of each branch, k a token), ``dense`` (a weight for every token and expert) or ``choice``
            (token of each branch, C an expert of a sample).
        expert: value of the expert ids, or of the chosen tokens; None for ``dense``.
        weight: value of the weights.
        slots: k, or C; for ``dense`` the most experts that a token can have.
        reduced: whether dense weights have a last axis to sum over (places in a capacity buffer).
        expert_first: whether weights of ``choice`` run over experts before samples.
    """

    kind: Kind
    expert: int | None
    weight: int
    slots: int
    reduced: bool = False
    expert_first: bool = False


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


def matches(tape: Tape, experts: Sequence[nn.Module], samples: int, seen: Sequence[Tensor] = ()) -> Iterator[Match]:
    """Every hypothesis that holds on a few rows, simplest first.

    Args:
        tape: of a call of the block.
        experts: one module an expert, in order; those without parameters (identity, zero) too.
        samples: batch size of the call.
        seen: rows that experts were called with; only token rows among which they are come into question.
    """
    count = len(experts)
    for x, rows in _token_rows(tape, seen):
        number = rows.shape[0]
        sample = _spread(number)
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            try:
                outputs = torch.stack([expert(rows[sample]) for expert in experts], 1).double()  # [J, E, H]
            except (RuntimeError, TypeError, ValueError):
                continue
        sums = _Sums(tape, number, outputs.shape[-1], sample, x)
        found = [(routing, part) for routing, part in _routed(tape, rows, outputs, sample, samples, count)]
        for routing, part in found:
            for total, rest in sums.containing(part):
                yield Match(x, routing, total, rest)


def _token_rows(tape: Tape, seen: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Different values that may be the experts' input [N, H], in the order of the tape."""
    known: list[Tensor] = []
    wanted = [part[0] for part in seen if part.dim() == 2 and part.shape[0]]
    for number in sorted(tape.values):
        value = tape.values[number]
        if not _floats(value) or value.dim() < 2:
            continue
        rows = value.reshape(-1, value.shape[-1])
        if wanted and not all(_holds(rows, row) for row in wanted[:4]):
            continue
        if any(rows.shape == other.shape and torch.equal(rows, other) for other in known):
            continue
        known.append(rows)
        yield number, rows


def _floats(value: Tensor) -> bool:
    return value.is_floating_point() and value.numel() > 1 and not value.is_inference()


def _holds(rows: Tensor, row: Tensor) -> bool:
    return rows.shape[-1] == row.shape[-1] and bool((rows == row).all(-1).any())


def _spread(number: int) -> Tensor:
    """Numbers of some rows, far apart."""
    count = min(number, _ROWS)
    return torch.arange(count) * number // count


# -- routing ------------------------------------------------------------------------------------------------------


def _routed(
    tape: Tape, rows: Tensor, outputs: Tensor, sample: Tensor, samples: int, count: int
) -> Iterator[tuple[Routing, Tensor]]:
    """Every routing on the tape, with the sum [J, H] that it gives on the sampled tokens."""
    number = rows.shape[0]
    values = {n: v for n, v in sorted(tape.values.items()) if v.numel() and not v.is_inference()}
    weights = {n: v for n, v in values.items() if v.is_floating_point()}
    for n, ids in values.items():
        if ids.is_floating_point() or ids.dtype == torch.bool or ids.numel() % number or not ids.dim():
            continue
        slots = ids.numel() // number
        if slots > count or int(ids.min()) < 0 or int(ids.max()) >= count:
            continue
        chosen = ids.reshape(number, slots)[sample]  # [J, k]
        if slots > 1 and bool((chosen.sort(-1).values.diff() == 0).any()):
            continue
        features = outputs.gather(1, chosen[..., None].expand(-1, -1, outputs.shape[-1]))
        for m, weight in weights.items():
            if weight.numel() == ids.numel():
                share = weight.reshape(number, slots)[sample].double()
                yield Routing("ids", n, m, slots), (share[..., None] * features).sum(1)
    for m, weight in weights.items():
        for reduced in (False, True):
            dense = weight.sum(-1) if reduced and weight.dim() > 2 else weight
            if (reduced and weight.dim() <= 2) or dense.dim() < 2:
                continue
            if dense.numel() != number * count or dense.shape[-1] != count:
                continue
            share = dense.reshape(number, count)
            bound = _most_chosen(tape, m, share)
            part = (share[sample].double()[..., None] * outputs).sum(1)
            yield Routing("dense", None, m, bound, reduced=reduced), part
    yield from _chosen(values, weights, number, outputs, sample, samples, count)


def _chosen(
    values: Mapping[int, Tensor],
    weights: Mapping[int, Tensor],
    number: int,
    outputs: Tensor,
    sample: Tensor,
    samples: int,
    count: int,
) -> Iterator[tuple[Routing, Tensor]]:
    """Experts that choose tokens: ids [B, E, C] within a sample."""
    tokens = number // samples
    for n, ids in values.items():
        if ids.is_floating_point() or ids.dtype == torch.bool or ids.dim() != 3 or ids.shape[:2] != (samples, count):
            continue
        if int(ids.min()) < 0 or int(ids.max()) >= tokens:
            continue
        place = ids + torch.arange(samples, device=ids.device)[:, None, None] * tokens
        for m, weight in weights.items():
            if weight.numel() != ids.numel():
                continue
            for expert_first in (False, True):
                share = _by_sample(weight, ids, expert_first)
                dense = torch.zeros(count, number, dtype=torch.float64, device=ids.device)
                for expert in range(count):
                    dense[expert].index_add_(0, place[:, expert].reshape(-1), share[:, expert].reshape(-1).double())
                part = (dense[:, sample].T[..., None] * outputs).sum(1)
                yield Routing("choice", n, m, ids.shape[-1], expert_first=expert_first), part


def _by_sample(weight: Tensor, ids: Tensor, expert_first: bool) -> Tensor:
    samples, count, slots = ids.shape
    if expert_first:
        return weight.reshape(count, samples, slots).transpose(0, 1)
    return weight.reshape(samples, count, slots)


def _most_chosen(tape: Tape, weight: int, dense: Tensor) -> int:
    """How many experts a token can have: k of a top-k over all experts that the weights follow from; E without one."""
    count = dense.shape[-1]
    found = int((dense != 0).sum(-1).max())
    makers = {number: entry for entry in tape.entries for number in entry.outputs if number is not None}
    stack, seen, bounds = [weight], set(), []
    while stack:
        number = stack.pop()
        if number in seen or number not in makers:
            continue
        seen.add(number)
        entry = makers[number]
        stack += entry.reads()
        source = entry.args[0] if entry.args else None
        if not isinstance(source, Ref) or source.number not in tape.values:
            continue
        value = tape.values[source.number]
        if value.dim() and value.shape[-1] == count:
            if entry.target is torch.ops.aten.topk.default:
                bounds.append(int(entry.args[1]))
            elif entry.target in (torch.ops.aten.argmax.default, torch.ops.aten.max.dim):
                bounds.append(1)
    fitting = [bound for bound in bounds if bound >= found]
    return max(fitting) if fitting else count


# -- the sum ------------------------------------------------------------------------------------------------------


class _Sums:
    """Values of the tape that may hold the routed sum."""

    def __init__(self, tape: Tape, number: int, width: int, sample: Tensor, x: int) -> None:
        self.numbers: list[int] = []
        parts = []
        for n in sorted(tape.values):
            value = tape.values[n]
            if _floats(value) and value.shape[-1] == width and value.numel() == number * width:
                self.numbers.append(n)
                parts.append(value.reshape(-1, width)[sample].double())
        none = torch.zeros(0, len(sample), width, dtype=torch.float64)
        self.parts = torch.stack(parts) if parts else none  # [C, J, H]
        self.limit = _NEAR.get(tape.values[x].dtype, 0.0)

    def containing(self, part: Tensor) -> Iterator[tuple[int, int | None]]:
        """(value, None) for values equal to `part` [J, H]; then (value, other) for those equal to their sum."""
        size = float(part.abs().max())
        if not self.numbers or not size > 0 or size != size:
            return
        left = self.parts - part
        error = left.abs().amax((1, 2))
        for index in torch.nonzero(error <= self.limit * size).flatten().tolist():
            yield self.numbers[index], None
        scale = self.parts.abs().amax((1, 2))
        for index in range(len(self.numbers)):
            if not size > 1e-3 * float(scale[index]):
                continue  # too small a part of that value to be told from rounding
            difference = (self.parts[:index] - left[index]).abs().amax((1, 2))
            for other in torch.nonzero(difference <= self.limit * size).flatten().tolist():
                yield self.numbers[index], self.numbers[other]
