"""Steps of one model: original, vectorised, full and cached, eager and compiled, at chosen recomputed fractions.

A fraction is set by taking experts out of the caches' slots: their branches find no match and are recomputed, whatever
the score says. Real decisions recompute about one branch of a token, so branches are taken from as many tokens as
there are, and only beyond one a token several from the same.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import moeca_fx
from bench.cpu.timing import interleave, milliseconds, ratio
from moeca_fx.runtime.flops import StepFlops
from moeca_fx.runtime.module import TransformedModel
from moeca_fx.runtime.program import Program

FRACTIONS = (0.0, 0.05, 0.1, 0.25, 0.5, 1.0)
KEEP_MATCHED = moeca_fx.MoECa(tau0=50.0)
NO_EXPERT = -1


def bench_steps(name: str, batch: int, dtype: torch.dtype, rounds: int, *, original: bool, fractions: bool) -> Any:
    """Times and ratios of one model.

    Args:
        original: whether to compile the original too, which breaks its graph at every expert loop.
        fractions: whether to time cached steps.
    """
    model = moeca_fx.zoo.build(name).to(dtype)
    inputs = tuple(part.to(dtype) if part.is_floating_point() else part for part in _inputs(name, batch))
    fast = moeca_fx.transform(model, inputs, policy=KEEP_MATCHED)
    eager = fast.with_policy(None, compile=False)
    vectorised = fast.with_policy(None)
    runs: dict[str, Callable[[], Any]] = {
        "original": lambda: model(*inputs),
        "vectorised eager": lambda: eager(*inputs),
    }
    if original:
        compiled = torch.compile(model)
        runs["original compiled"] = lambda: compiled(*inputs)
    runs["vectorised"] = lambda: vectorised(*inputs)
    start = time.perf_counter()
    share: dict[str, float] = {}
    with torch.no_grad():
        if fractions:
            runs["full step"] = lambda: _full(fast, inputs)
            runs["full step"]()
            cached, share = _cached_runs(fast, inputs, batch)
            runs |= cached
        for run in runs.values():
            run()
        ready = time.perf_counter() - start
        seconds = interleave(runs, rounds, twice=True)
    return {
        "model": name,
        "batch": batch,
        "dtype": str(dtype).removeprefix("torch."),
        "compile_s": ready,
        "flops": _flops(vectorised, inputs, batch),
        "weight_bytes": sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()),
        "cache_bytes": fast.memory().total,
        "estimated_cache_bytes": moeca_fx.estimate_memory(model, inputs, policy=KEEP_MATCHED, batch=batch).total,
        "ms": {key: milliseconds(value) for key, value in seconds.items()},
        "over_original": {key: ratio(seconds["original"], value) for key, value in seconds.items()},
        "of_vectorised": {key: ratio(value, seconds["vectorised"]) for key, value in seconds.items()},
        "over_original_compiled": ratio(seconds["original compiled"], seconds["vectorised"]) if original else None,
        "of_full_step": {key: ratio(value, seconds["full step"]) for key, value in seconds.items()}
        if fractions
        else {},
        "flops_of_full_step": share,
    }


def _flops(vectorised: TransformedModel, inputs: tuple[Tensor, ...], batch: int) -> int:
    """FLOPs of one uncached call."""
    program = next(iter(vectorised._moeca.programs.values()))
    return vectorised._moeca.accounting.tally(program, list(inputs), batch).step_flops().uncached.executed(1, {})


def _inputs(name: str, batch: int) -> tuple[Tensor, ...]:
    return tuple(moeca_fx.zoo.example_inputs(name, batch))


def _full(fast: TransformedModel, inputs: tuple[Tensor, ...]) -> Any:
    """A full step as a trajectory takes it: the caches of the one before make room."""
    fast._moeca.trajectories.clear()
    return fast(*inputs)


def _cached_runs(
    fast: TransformedModel, inputs: tuple[Tensor, ...], batch: int
) -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
    """`cached_runs` after the full step of a transformed model."""
    program = next(iter(fast._moeca.programs.values()))
    states = fast._moeca.trajectories["default"].states
    flops = fast._moeca.accounting.tally(program, list(inputs), batch).step_flops()
    return cached_runs(program, states, flops, inputs, batch, FRACTIONS)


def cached_runs(
    program: Program,
    states: list[Tensor],
    flops: StepFlops,
    inputs: tuple[Tensor, ...],
    batch: int,
    fractions: tuple[float, ...],
) -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
    """A run of the first rule's step for each fraction, and its FLOPs over a full step's.

    Args:
        states: caches after a full step, which stay as they are.
    """
    graphs = program.graphs
    assert graphs is not None
    rule = graphs.rules[0]
    runs: dict[str, Callable[[], Any]] = {}
    share: dict[str, float] = {}
    for fraction in fractions:
        held = [state.clone() for state in states]  # of its own: a step leaves features in the slots it chose
        taken = {
            i: without_experts(held[i], fraction) for i, state in enumerate(graphs.states) if state.kind == "expert"
        }
        name = f"cached {fraction:.0%}"
        runs[name] = _cached_run(program, rule.name, batch, inputs, held, taken)
        counts = runs[name]()[-1].tolist()
        share[name] = share_of_full(flops, dict(zip(rule.counters, counts, strict=True)))
    return runs, share


def _cached_run(
    program: Program, rule: str, batch: int, inputs: tuple[Tensor, ...], held: list[Tensor], taken: dict[int, Tensor]
) -> Callable[[], Any]:
    def run() -> Any:
        for index, experts in taken.items():  # the step writes the experts that it found
            held[index].copy_(experts)
        return program.run(rule, batch, *inputs, *held)

    return run


def share_of_full(flops: StepFlops, counts: dict[Any, int]) -> float:
    """FLOPs of a step of the first rule over a full step's, by what it counted."""
    return flops.rules[0].executed(1, counts) / flops.full.executed(1, {})


def without_experts(expert: Tensor, fraction: float) -> Tensor:
    """Cached experts [B, T, k] of which `fraction` are gone, from as many tokens as possible."""
    top_k, tokens = expert.shape[-1], expert.shape[0] * expert.shape[1]
    each, more = divmod(round(fraction * tokens * top_k), tokens)  # of every token, and one more of some
    rows = torch.randperm(tokens, generator=torch.Generator().manual_seed(more))
    left = expert.clone().view(tokens, top_k)
    left[:, :each] = NO_EXPERT
    if more:
        left[rows[:more], each] = NO_EXPERT
    return left.view_as(expert)
