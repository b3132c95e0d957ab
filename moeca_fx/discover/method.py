"""Prove a dispatching method: ``sum_k weight_k * expert_k(x)`` of its arguments, roles found by shape and value.

def moe_infer(self, x, flat_ids, flat_weights): ...        x: rows, expert: flat_ids, weight: flat_weights
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from moeca_fx.discover import expert_choice as candidates
from moeca_fx.discover.inline.tape import NotReplayable
from moeca_fx.discover.records import Layout
from moeca_fx.discover.reference import branch_sum, choice_as_tokens, tolerance_of
from moeca_fx.discover.scales import OffScale, Sample, check_scales
from moeca_fx.reasons import Reason

_EXCHANGES = 6  # more calls of a method, at most, to see every expert

MethodCall = tuple[dict[str, Any], Any]
Spied = dict[tuple[str, str], list[MethodCall]]


@dataclass(frozen=True)
class TracedMethod:
    """The method (`owner` path, `name`) that dispatches to a candidate's experts."""

    owner: str
    name: str


@dataclass(frozen=True)
class Roles:
    """Parameter names that carry token rows, expert ids (or chosen tokens) and weights.

    Attributes:
        x, expert, weight: the names.
        top_k: branches a token, or tokens an expert takes.
        layout: who chooses.
        empty_slots: whether some ids stand for no expert.
        error: of the proof.
    """

    x: str
    expert: str
    weight: str
    top_k: int
    layout: Layout
    empty_slots: bool
    error: float


@contextmanager
def replaced_method(owner: nn.Module, name: str, function: Any) -> Iterator[None]:
    """Shadow a method on the instance inside the block; the class and other instances keep theirs."""
    had, old = name in owner.__dict__, owner.__dict__.get(name)
    object.__setattr__(owner, name, function)
    try:
        yield
    finally:
        if had:
            object.__setattr__(owner, name, old)
        else:
            object.__delattr__(owner, name)


@contextmanager
def spied(owner: nn.Module, name: str, calls: list[MethodCall]) -> Iterator[None]:
    """Keep arguments and result of every call of a method inside the block."""
    original = getattr(owner, name)
    signature = inspect.signature(original)

    def spy(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        before = {k: v.clone() if isinstance(v, Tensor) else v for k, v in bound.arguments.items()}
        output = original(*args, **kwargs)
        calls.append((before, output))
        return output

    with replaced_method(owner, name, spy):
        yield


def prove_method(
    experts: Sequence[nn.Module],
    calls: Sequence[MethodCall],
    crowded: Sequence[MethodCall],
    method: Callable[..., Any],
) -> Roles:
    """Find the roles of a method's arguments.

    Args:
        experts: one module an expert.
        calls: of one forward of the model.
        crowded: calls in which all tokens ask for the same experts, so that limits show; the same roles must hold.
        method: bound; called again where one call does not show every expert's factor.

    Raises:
        NotReplayable: with the reason.
        OffScale: it is the sum but for one expert's factor.
    """
    if len(calls) != 1:
        problem = f"called {len(calls)} times in one forward; exactly one call is supported"
        raise NotReplayable(problem, Reason.CALLED_AGAIN)
    arguments, output = calls[0]
    if not isinstance(output, Tensor):
        raise NotReplayable(f"returns {type(output).__name__}; expected one tensor", Reason.RESULT)
    if not bool(torch.isfinite(output).all()):
        problem = "returned NaN or infinity in the probe run; check the weights and the example inputs"
        raise NotReplayable(problem, Reason.NOT_FINITE)
    off: OffScale | None = None
    reason = "no arguments have the shapes of token rows, expert ids and routing weights"
    nearest, code = float("inf"), Reason.ROLES_UNKNOWN
    for layout, names in _triples(arguments, output, len(experts)):
        try:
            error, empty = _check(experts, layout, names, calls[0])
            for call in crowded:
                other, also_empty = _check(experts, layout, names, call)
                error, empty = max(error, other), empty or also_empty
        except _Differs as found:
            if found.error < nearest:
                nearest, reason, code = found.error, str(found), found.code
            continue
        rows, ids = arguments[names[0]], arguments[names[1]]
        slots = ids.shape[-1] if layout == "expert" else ids.numel() // (rows.numel() // rows.shape[-1])
        try:
            samples = _samples(method, [calls[0], *crowded], names, layout, len(experts))
            check_scales(experts, samples, off is not None)
        except OffScale as problem:
            off = off or problem
            continue
        return Roles(*names, slots, layout, empty, error)
    raise off or NotReplayable(reason, code)


def _samples(
    method: Callable[..., Any], calls: Sequence[MethodCall], names: candidates.Roles, layout: Layout, count: int
) -> Iterator[Sample]:
    """The calls, and calls in which experts exchange their tokens, busy ones with idle ones first."""

    def sample(rows: Tensor, chosen: Tensor, share: Tensor, result: Tensor, proven: bool) -> Sample:
        expert, weight = choice_as_tokens(rows, chosen, share) if layout == "expert" else (chosen, share)
        return Sample(rows, expert, weight, result.double().reshape(-1, result.shape[-1]), result, proven)

    for given, output in calls:
        rows, ids, share = (given[name] for name in names)
        yield sample(rows, ids, share, output, True)
    given, output = calls[0]
    rows, ids, share = (given[name] for name in names)
    others = [value for name, value in given.items() if name not in names and isinstance(value, Tensor)]
    if others:  # they may hold what follows from the ids, such as counts
        return
    for turn in range(_EXCHANGES):
        chosen = ids.roll(turn + 1, 1) if layout == "expert" else _exchanged(ids, count, turn)
        arguments = {name: value.clone() if isinstance(value, Tensor) else value for name, value in given.items()}
        arguments[names[1]] = chosen.clone()
        try:
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                result = method(**arguments)
        except (RuntimeError, ValueError, IndexError):  # ids that the method cannot get from its router
            return
        if isinstance(result, Tensor) and result.shape == output.shape:
            yield sample(rows, chosen, share, result, False)


def _exchanged(ids: Tensor, count: int, turn: int) -> Tensor:
    """Ids with the busiest expert's tokens given to the idlest, and so on; ids of no expert stay."""
    real = (ids >= 0) & (ids < count)
    busy = torch.bincount(ids[real].flatten().long(), minlength=count).argsort(descending=True, stable=True)
    table = torch.empty_like(busy)
    table[busy] = busy.flip(0).roll(turn)
    return torch.where(real, table.to(ids.dtype)[ids.clamp(0, count - 1).long()], ids)


class _Differs(Exception):
    """Roles that do not explain a call; `error` is how far they are off."""

    def __init__(self, message: str, error: float, code: Reason) -> None:
        super().__init__(message)
        self.error, self.code = error, code


def _check(
    experts: Sequence[nn.Module], layout: Layout, names: candidates.Roles, call: MethodCall
) -> tuple[float, bool]:
    """(error relative to the largest output, whether an id stands for no expert) of one call under these roles.

    Raises:
        _Differs: it is no weighted sum over the experts.
    """
    arguments, output = call
    rows, ids, share = (arguments[name] for name in names)
    try:
        if layout == "expert":
            ids, share = choice_as_tokens(rows, ids, share)
        total = branch_sum(experts, rows, ids, share).reshape(output.shape)
    except (RuntimeError, TypeError, ValueError) as problem:
        said = f"an expert could not be run on token rows alone: {problem}"
        raise _Differs(said, 1e30, Reason.NOT_BY_ROWS) from problem
    error = float((total - output.double()).abs().max() / output.abs().max().double().clamp_min(1e-30))
    limit = tolerance_of(output.dtype)
    if not error <= limit:
        said = f"sum_k weight_k * expert_k(x) differs from its output by {error:.1e} relative (allowed {limit:.0e})"
        raise _Differs(said, error, Reason.NOT_A_WEIGHTED_SUM)
    return error, layout == "token" and bool((ids >= len(experts)).any())


def _triples(arguments: Mapping[str, Any], output: Tensor, count: int) -> Iterator[tuple[Layout, candidates.Roles]]:
    """Names of arguments that have the shapes of token rows, expert ids or chosen tokens, and weights."""
    tensors = {k: v for k, v in arguments.items() if isinstance(v, Tensor)}
    for names in candidates.candidate_roles(tensors, count):
        if tensors[names[0]].shape == output.shape:
            yield "expert", names
    rows = [k for k, v in tensors.items() if v.is_floating_point() and v.shape == output.shape]
    ids = [k for k, v in tensors.items() if not v.is_floating_point() and v.dtype != torch.bool and v.dim() >= 1]
    weights = [k for k, v in tensors.items() if v.is_floating_point()]
    for x, expert, weight in product(rows, ids, weights):
        tokens = tensors[x].numel() // tensors[x].shape[-1]
        fits = tensors[weight].numel() == tensors[expert].numel() and tensors[expert].numel() % tokens == 0
        if weight != x and fits:
            yield "token", (x, expert, weight)
