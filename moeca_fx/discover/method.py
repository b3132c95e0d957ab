"""Prove a dispatching method: ``sum_k weight_k * expert_k(x)`` of its arguments, roles found by shape and value.

def moe_infer(self, x, flat_ids, flat_weights): ...        x: rows, expert: flat_ids, weight: flat_weights
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from moeca_fx.discover import expert_choice as candidates
from moeca_fx.discover.inline.tape import NotReplayable
from moeca_fx.discover.records import Layout
from moeca_fx.discover.reference import TOLERANCE, branch_sum, choice_as_tokens
from moeca_fx.discover.scales import off_scale

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


def prove_method(experts: Sequence[nn.Module], calls: Sequence[MethodCall]) -> Roles:
    """Find the roles of a method's arguments.

    Args:
        experts: one module an expert.
        calls: of one forward of the model.

    Raises:
        NotReplayable: with the reason.
    """
    if len(calls) != 1:
        raise NotReplayable(f"called {len(calls)} times in one forward; exactly one call is supported")
    arguments, output = calls[0]
    if not isinstance(output, Tensor):
        raise NotReplayable(f"returns {type(output).__name__}; expected one tensor")
    if not bool(torch.isfinite(output).all()):
        raise NotReplayable("returned NaN or infinity in the probe run; check the weights and the example inputs")
    limit = TOLERANCE.get(output.dtype, 0.0)
    nearest, reason = float("inf"), "no arguments have the shapes of token rows, expert ids and routing weights"
    for layout, (x, expert, weight) in _triples(arguments, output, len(experts)):
        rows, ids, share = (arguments[name] for name in (x, expert, weight))
        slots = ids.shape[-1] if layout == "expert" else ids.numel() // (rows.numel() // rows.shape[-1])
        try:
            if layout == "expert":
                ids, share = choice_as_tokens(rows, ids, share)
            total = branch_sum(experts, rows, ids, share).reshape(output.shape)
        except (RuntimeError, TypeError, ValueError) as problem:
            reason = f"an expert could not be run on token rows alone: {problem}"
            continue
        error = float((total - output.double()).abs().max() / output.abs().max().double().clamp_min(1e-30))
        nearest = min(nearest, error)
        if error <= limit:
            problem_found = off_scale(experts, rows, ids, share, output.double().reshape(-1, output.shape[-1]), output)
            if problem_found is not None:
                reason = problem_found
                continue
            empty = layout == "token" and bool((ids >= len(experts)).any())
            return Roles(x, expert, weight, slots, layout, empty, error)
        reason = f"sum_k weight_k * expert_k(x) differs from its output by {nearest:.1e} relative (allowed {limit:.0e})"
    raise NotReplayable(reason)


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
