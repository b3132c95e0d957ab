"""Checks and times the GPU kernels, then whole trajectories; needs one CUDA GPU, torch 2.11 and triton, no network.

    python bench/gpu.py                    below 8 minutes; prints a table
    python bench/gpu.py --out gpu.json     also writes every number
    python bench/gpu.py --quick            small batches only, about 2 minutes
    python bench/gpu.py --interpret        no GPU: only checks the kernels, on tiny shapes in Triton's interpreter

Every kernel is compared with an fp64 reference before it is timed, and a wrong one is not timed. Kernels are timed
inside CUDA graphs with CUDA events, variants taking turns, the L2 cache overwritten before each run; a ratio is the
median of the ratios within a round. What does not fit the time is dropped, largest last, and listed under "dropped".
"""

import argparse
import contextlib
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

START = time.perf_counter()
BUDGET = 450.0  # seconds; the rest of 8 minutes is for what is under way when it ends
FRACTIONS = (0.0, 0.05, 0.1, 0.25, 0.5, 1.0)
NAMES = ("dsmoe-s-e16", "dsmoe-s-e48", "dsmoe-l-e16", "dsmoe-l-e48", "dit-moe-xl")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
DEVICE = torch.device("cuda")
MARK = -7.0  # what rows hold that no kernel may write
Run = Callable[[], Any]


@dataclass(frozen=True)
class Shape:
    """Sizes of one MoE block and its attention."""

    name: str
    width: int
    inner: int
    experts: int
    top_k: int
    tokens: int
    heads: int


TINY = (
    Shape("tiny", 48, 32, 6, 5, 19, 3),
    Shape("tiny-115", 115, 115, 5, 1, 23, 1),
)


def published(name: str) -> Shape:
    """The shape of a zoo model."""
    from moeca_fx.zoo.catalog import config_of

    c = config_of(name)
    return Shape(name, c.hidden_size, c.expert_width, c.num_experts, c.top_k, c.tokens, c.num_heads)


class Case:
    """Seeded tensors of one shape and batch: token rows, experts, routing now and in the cache, features."""

    def __init__(self, shape: Shape, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.batch, self.dtype, self.device = shape, batch, dtype, device
        self.generator = torch.Generator(device).manual_seed(7)
        s, rows = shape, batch * shape.tokens
        self.x = self.normal(rows, s.width)
        self.gate, self.up = (self.normal(s.experts, s.inner, s.width) * s.width**-0.5 for _ in range(2))
        self.down = self.normal(s.experts, s.width, s.inner) * s.inner**-0.5
        self.expert, self.cached = (self.uniform(rows, s.experts).topk(s.top_k).indices for _ in range(2))
        self.cached = torch.where(self.uniform(rows, 1) < 0.7, self.expert.flip(-1), self.cached)
        self.weight, self.then, self.norm = (self.uniform(rows, s.top_k) for _ in range(3))
        self.threshold = self.uniform(batch, s.experts) + 0.4
        self.feature = torch.full((rows * s.top_k, s.width), MARK, dtype=dtype, device=device)
        self.norms = torch.full((rows * s.top_k,), MARK, device=device)

    def normal(self, *size: int) -> Tensor:
        """Standard normal values in the case's dtype."""
        return torch.randn(size, generator=self.generator, device=self.device).to(self.dtype)

    def uniform(self, *size: int) -> Tensor:
        """Uniform values in [0, 1), fp32."""
        return torch.rand(size, generator=self.generator, device=self.device)

    def code(self, fraction: float) -> Tensor:
        """[N, k] int8: `fraction` of all branches recomputed, spread over all tokens."""
        return (self.uniform(*self.expert.shape) < fraction).to(torch.int8)

    def decision(self) -> tuple[Any, ...]:
        """Arguments of `decide`."""
        tensors = (self.expert, self.weight, self.cached, self.then, self.norm)
        slots = tuple(each.view(self.batch, self.shape.tokens, -1) for each in tensors)
        return (*slots, self.threshold, 1.1, 0.6, "share")

    def attention(self, fraction: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query, key, value [B, T, h, d] and a mask [B, T]."""
        s = self.shape
        size = (self.batch, s.tokens, s.heads, s.width // s.heads)
        mask = self.uniform(self.batch, s.tokens) < fraction
        return self.normal(*size), self.normal(*size), self.normal(*size), mask


# -- correctness ----------------------------------------------------------------------------------------------------


def close(found: Tensor, expected: Tensor, tolerance: float) -> float:
    """Relative L2 error; raises where it or the largest single error is too large."""
    difference = found.double() - expected
    scale = expected.norm() / max(1, expected.numel()) ** 0.5
    error = float(difference.norm() / expected.norm().clamp_min(1e-30)) if expected.numel() else 0.0
    worst = float(difference.abs().max() / scale.clamp_min(1e-30)) if expected.numel() else 0.0
    if not (error <= tolerance and worst <= 20 * tolerance):
        raise AssertionError(f"relative error {error:.2e}, largest {worst:.2e}, allowed {tolerance:.0e}")
    return error


def check_decide(case: Case) -> float:
    """Against the reference on fp64 values; codes may differ where score and threshold agree up to rounding."""
    from moeca_fx.kernels import triton_gpu
    from moeca_fx.policies import branch

    arguments = case.decision()
    found = triton_gpu.decide(*arguments)
    wide: list[Any] = [
        each.double() if isinstance(each, Tensor) and each.is_floating_point() else each for each in arguments
    ]
    slot, expert, weight, code = branch.decide(*wide)
    score = branch.branch_score(weight, wide[3], wide[4], *wide[6:8])
    limit = wide[5].gather(1, expert.flatten(1)).view_as(score)
    sure = (score - limit).abs() > 1e-5
    assert torch.equal(found[0], slot) and torch.equal(found[1], expert), "slots differ"
    assert torch.equal(found[3][sure], code[sure]), "codes differ"
    return close(found[2], weight, 1e-6)


def check_plan(case: Case, fraction: float = 0.3) -> float:
    """Against a stable sort."""
    from moeca_fx.kernels import triton_gpu
    from moeca_fx.ops import dispatch

    code = case.code(fraction)
    order, offsets, count = triton_gpu.plan(code, case.expert, case.shape.experts)
    expected, _, _, ends = dispatch.plan_recomputed(code, case.expert, None, case.shape.experts)
    assert int(count) == len(expected) and torch.equal(offsets.long(), ends), "offsets differ"
    assert torch.equal(order[: len(expected)], expected), "order differs"
    assert torch.equal(order.sort().values, torch.arange(len(order), device=order.device)), "not a permutation"
    return 0.0


def check_experts(case: Case, fraction: float, run: Callable[[Tensor, Tensor], None], rows: int = 512) -> float:
    """Some written rows against fp64, all others against the mark; norms too where they were written."""
    from moeca_fx.kernels import triton_gpu

    code = case.code(fraction)
    case.feature.fill_(MARK)
    case.norms.fill_(MARK)
    order, offsets, count = triton_gpu.plan(code, case.expert, case.shape.experts)
    run(order, offsets)
    assert bool((case.feature[code.flatten() == 0] == MARK).all()), "a reused row was written"
    live = order[: int(count)]
    live = live[torch.randperm(len(live), device=live.device)[:rows]]
    ids, expected = case.expert.flatten()[live], torch.empty(len(live), case.shape.width, dtype=torch.float64)
    expected = expected.to(case.device)
    for index in ids.unique().tolist():
        own = ids == index
        x = case.x[live[own] // case.shape.top_k].double()
        inner = functional.silu(x @ case.gate[index].double().t()) * (x @ case.up[index].double().t())
        expected[own] = inner @ case.down[index].double().t()
    if len(live) and float(case.norms[live[0]]) != MARK:
        close(case.norms[live], case.feature[live].double().norm(dim=-1), 1e-5)
    return close(case.feature[live], expected, TOLERANCE[case.dtype])


def experts_run(case: Case, tiles: Any = None) -> Callable[[Tensor, Tensor], None]:
    """`gated_experts` on a plan."""
    from moeca_fx.kernels import triton_gpu

    c = case
    return lambda order, offsets: triton_gpu.gated_experts(
        c.x, order, offsets, c.shape.top_k, c.gate, c.up, c.down, c.feature, norm=c.norms, tiles=tiles
    )


def grouped_mm_run(case: Case) -> Callable[[Tensor, Tensor], None]:
    """The path through `torch.nn.functional.grouped_mm` on a plan."""
    from moeca_fx.kernels import triton_gpu

    c = case
    return lambda order, offsets: triton_gpu.grouped_mm_experts(
        c.x, order, offsets, c.shape.top_k, c.gate, c.up, c.down, c.feature
    )


def check_combine(case: Case) -> float:
    """Features of the case's dtype, and stored in 8 bits with a scale."""
    from moeca_fx.kernels import triton_gpu

    s = case.shape
    feature, weight = case.normal(case.x.shape[0], s.top_k, s.width), case.weight
    exact = (feature.double() * weight.double().unsqueeze(-1)).sum(1)
    error = close(triton_gpu.combine_slots(feature, weight), exact, TOLERANCE[case.dtype])
    scale = feature.float().abs().amax(-1) / torch.finfo(torch.float8_e4m3fn).max
    stored = (feature.float() / scale.unsqueeze(-1)).to(torch.float8_e4m3fn)
    exact = (stored.float().double() * (scale * weight).double().unsqueeze(-1)).sum(1)
    close(triton_gpu.combine_slots(stored, weight, scale), exact, 1e-5)
    return error


def check_attention(case: Case, fraction: float = 0.3) -> float:
    """Selected rows of both forms against dense attention; rows outside the mask stay."""
    from moeca_fx.kernels import triton_gpu

    query, key, value, mask = case.attention(fraction)
    heads_first = [each.double().transpose(1, 2) for each in (query, key, value)]
    logits = heads_first[0] @ heads_first[1].transpose(-1, -2) * query.shape[-1] ** -0.5
    exact = (logits.softmax(-1) @ heads_first[2]).transpose(1, 2)[mask]
    out = triton_gpu.attention_rows_masked(query, key, value, mask, out=torch.full_like(query, MARK))
    assert bool((out[~mask] == MARK).all()), "a row outside the mask was written"
    row = mask.flatten().nonzero().squeeze(1)
    packed = triton_gpu.attention_rows_packed(query.flatten(0, 1)[row], key, value, row)
    close(packed, exact, TOLERANCE[case.dtype])
    return close(out[mask], exact, TOLERANCE[case.dtype])


def check(case: Case) -> dict[str, Any]:
    """Each kernel's relative error, or the text of its failure, on one case."""
    runs: dict[str, Run] = {
        "decide": lambda: check_decide(case),
        "plan": lambda: max(check_plan(case, fraction) for fraction in (0.0, 0.3, 1.0)),
        "experts": lambda: max(check_experts(case, fraction, experts_run(case)) for fraction in (0.0, 0.3, 1.0)),
        "combine": lambda: check_combine(case),
        "attention": lambda: max(check_attention(case, fraction) for fraction in (0.0, 0.3, 1.0)),
    }
    if case.dtype == torch.bfloat16 and case.shape.width % 8 == 0 and case.shape.inner % 8 == 0:
        runs["grouped_mm"] = lambda: max(check_experts(case, share, grouped_mm_run(case)) for share in (0.3, 1.0))
    return {name: guarded(run) for name, run in runs.items()}


def guarded(run: Run) -> Any:
    """The result, or the error as text: one failure must not hide the other results."""
    try:
        return run()
    except Exception as error:  # noqa: BLE001 - a failure is a result here, and is reported as one
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


# -- timing ---------------------------------------------------------------------------------------------------------


def left() -> float:
    """Seconds left of the budget."""
    return BUDGET - (time.perf_counter() - START)


def captured(run: Run) -> Run:
    """The run as a CUDA graph, warmed up; raises when it cannot be captured (a host synchronisation, for one)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def interleaved(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every run in every round; the runs take turns, and the L2 cache is cold before each."""
    size = 2 * torch.cuda.get_device_properties(0).L2_cache_size
    flush = torch.empty(size, dtype=torch.int8, device="cuda")
    names = list(runs)
    events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            flush.zero_()
            pair[0].record()
            runs[name]()
            pair[1].record()
            events[name].append(pair)
    torch.cuda.synchronize()
    return {name: [start.elapsed_time(end) for start, end in pairs[1:]] for name, pairs in events.items()}


def ratio(times: dict[str, list[float]], base: str, own: str) -> float | None:
    """Median over the rounds of base over own; None where one was not timed."""
    if base not in times or own not in times:
        return None
    return round(statistics.median(a / b for a, b in zip(times[base], times[own], strict=True)), 3)


def timed(runs: dict[str, Run], rounds: int, errors: dict[str, str]) -> dict[str, list[float]]:
    """`interleaved` over what can be captured; what cannot is named in `errors`."""
    graphs: dict[str, Run] = {}
    for name, run in runs.items():
        graph = guarded(partial(captured, run))
        if isinstance(graph, str):
            errors[name] = graph
        else:
            graphs[name] = graph
    return interleaved(graphs, rounds) if graphs else {}


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    """Median milliseconds by name."""
    return {f"{name}_ms": round(statistics.median(each), 5) for name, each in times.items()}


def time_experts(case: Case, verdict: dict[str, Any], rounds: int, tune: bool) -> list[dict[str, Any]]:
    """Experts at every recomputed fraction against grouped_mm and dense GEMMs of the same FLOPs."""
    from moeca_fx.kernels import triton_gpu

    s, entries = case.shape, []
    few, many = (chosen_tiles(case, share, tune and isinstance(verdict["experts"], float)) for share in (0.1, 1.0))
    for fraction in FRACTIONS:
        tiles = few if fraction < 0.5 else many
        right = guarded(
            partial(lambda share, tiles: check_experts(case, share, experts_run(case, tiles)), fraction, tiles)
        )
        code, decision = case.code(fraction), case.decision()
        order, offsets, count = triton_gpu.plan(code, case.expert, s.experts)
        rows = int(count)
        entry: dict[str, Any] = {"fraction": fraction, "rows": rows, "tiles": str(tiles), "not_timed": {}}
        runs: dict[str, Run] = {}
        if isinstance(right, str) or isinstance(verdict["experts"], str):
            entry["not_timed"]["experts"] = right if isinstance(right, str) else verdict["experts"]
        else:
            experts = experts_run(case, tiles)
            runs["experts"] = partial(experts, order, offsets)
        if isinstance(verdict.get("grouped_mm"), float):
            runs["grouped_mm"] = partial(lambda *groups: grouped_mm_run(case)(*groups), order, offsets)
        else:
            entry["not_timed"]["grouped_mm"] = verdict.get("grouped_mm", "not checked")
        if rows:
            x, inner = case.normal(rows, s.width), case.normal(rows, s.inner)
            first, second = case.normal(2 * s.inner, s.width), case.normal(s.width, s.inner)
            runs["dense"] = partial(lambda x, inner, a, b: (x @ a.t(), inner @ b.t()), x, inner, first, second)
        if "experts" in runs and all(isinstance(verdict[name], float) for name in ("decide", "plan", "combine")):
            runs["site"] = partial(moe_site, case, code, experts, decision)
        times = timed(runs, rounds, entry["not_timed"])
        entry["share_of_dense_rate"] = ratio(times, "dense", "experts")
        entry["faster_than_grouped_mm"] = ratio(times, "grouped_mm", "experts")
        entry |= medians(times)
        if "experts" in times:
            entry["experts_tflops"] = round(6e-9 * rows * s.width * s.inner / entry["experts_ms"], 1)
        entries.append(entry)
    for entry in entries:  # what a cached step should cost is its fraction, plus little
        if "site_ms" in entry and "site_ms" in entries[-1]:
            entry["site_share_of_full"] = round(entry["site_ms"] / entries[-1]["site_ms"], 3)
    return entries


def chosen_tiles(case: Case, fraction: float, tune: bool) -> Any:
    """Tiles by rule, or those that are fastest at one recomputed fraction."""
    from moeca_fx.kernels import triton_gpu

    rows = case.expert.numel()
    if not tune:
        return triton_gpu.default_tiles(rows, case.up)
    order, offsets, _ = triton_gpu.plan(case.code(fraction), case.expert, case.shape.experts)
    return triton_gpu.tuned_tiles(lambda tiles: experts_run(case, tiles)(order, offsets), rows, case.up)


def moe_site(case: Case, code: Tensor, experts: Callable[[Tensor, Tensor], None], decision: tuple[Any, ...]) -> Tensor:
    """All kernels of a MoE site in their order; the decision's own codes give way to those of the sweep."""
    from moeca_fx.kernels import triton_gpu

    s = case.shape
    triton_gpu.decide(*decision)
    order, offsets, _ = triton_gpu.plan(code, case.expert, s.experts)
    experts(order, offsets)
    return triton_gpu.combine_slots(case.feature.view(-1, s.top_k, s.width), case.weight)


def time_others(case: Case, verdict: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Decision, plan, combination and attention against the PyTorch formulations that give the same."""
    from moeca_fx.kernels import triton_gpu
    from moeca_fx.ops import dispatch
    from moeca_fx.policies import branch

    s, rows = case.shape, case.x.shape[0]
    code, decision = case.code(0.25), case.decision()
    feature = case.normal(rows, s.top_k, s.width)
    slots = feature.view(case.batch, s.tokens, s.top_k, s.width)
    weight = case.weight.view(case.batch, s.tokens, s.top_k)

    def sorted_plan() -> tuple[Tensor, Tensor]:
        key = torch.where(code.flatten() > 0, case.expert.flatten(), s.experts)
        ordered, order = torch.sort(key, stable=True)
        return order, torch.searchsorted(ordered, torch.arange(s.experts, device=key.device), right=True)

    pairs: dict[str, tuple[Run, Run]] = {
        "decide": (lambda: triton_gpu.decide(*decision), lambda: branch.decide(*decision)),
        "plan": (lambda: triton_gpu.plan(code, case.expert, s.experts), sorted_plan),
        "combine": (lambda: triton_gpu.combine_slots(slots, weight), lambda: dispatch.combine_slots(slots, weight)),
    }
    result: dict[str, Any] = {}
    for name, (own, other) in pairs.items():
        if isinstance(verdict[name], str):
            result[name] = {"not_timed": verdict[name]}
            continue
        entry: dict[str, Any] = {"not_timed": {}}
        times = timed({"kernel": own, "torch": other}, rounds, entry["not_timed"])
        result[name] = entry | {"faster_than_torch": ratio(times, "torch", "kernel")} | medians(times)
    if "kernel_ms" in result["combine"]:
        moved = (feature.numel() + case.x.numel()) * feature.itemsize + weight.numel() * weight.itemsize
        result["combine"]["gigabytes_a_second"] = round(moved / result["combine"]["kernel_ms"] / 1e6, 1)
    if isinstance(verdict["attention"], str):
        return result | {"attention": {"not_timed": verdict["attention"]}}
    return result | {"attention": [time_attention(case, fraction, rounds) for fraction in FRACTIONS]}


def time_attention(case: Case, fraction: float, rounds: int) -> dict[str, Any]:
    """Attention of selected rows against dense attention of all rows."""
    from moeca_fx.kernels import triton_gpu

    query, key, value, mask = case.attention(fraction)
    out, errors = torch.zeros_like(query), dict[str, Any]()
    dense = [each.transpose(1, 2) for each in (query, key, value)]
    runs: dict[str, Run] = {
        "rows": lambda: triton_gpu.attention_rows_masked(query, key, value, mask, out=out),
        "dense": lambda: functional.scaled_dot_product_attention(dense[0], dense[1], dense[2]),
    }
    times = timed(runs, rounds, errors)
    share = ratio(times, "rows", "dense")
    return {"fraction": fraction, "share_of_dense_time": share, "not_timed": errors} | medians(times)


# -- whole trajectories ---------------------------------------------------------------------------------------------


def trajectory(model: Any, x: Tensor, y: Tensor, steps: int) -> Tensor:
    """Rectified flow, Euler, t from 0 to 1."""
    for step in range(steps):
        out = model(x, torch.full((x.shape[0],), step / steps, device=x.device), y)
        velocity = (out if isinstance(out, Tensor) else out[0])[:, : x.shape[1]]
        x = x + velocity.to(x.dtype) / steps
    return x


def end_to_end(name: str, batch: int, steps: int, rounds: int) -> dict[str, Any]:
    """Original, vectorised and cached model over one trajectory, bf16, seeded random weights."""
    import moeca_fx

    model = moeca_fx.zoo.build(name).to(DEVICE, torch.bfloat16)
    x, t, y = moeca_fx.zoo.example_inputs(name, batch=batch)
    x, t, y = x.to(DEVICE, torch.bfloat16), torch.rand_like(t).to(DEVICE), y.to(DEVICE)
    inputs = (x, t, y)
    makers: dict[str, Run] = {
        "original": lambda: model,
        "vectorised": lambda: moeca_fx.transform(model, inputs, policy=None),
        "moeca": lambda: moeca_fx.transform(model, inputs),
    }
    entry: dict[str, Any] = {"model": name, "batch": batch, "steps": steps, "errors": {}, "setup_seconds": {}}
    runs: dict[str, Any] = {}
    results: dict[str, Tensor] = {}
    for variant, make in makers.items():
        began = time.perf_counter()
        made = guarded(partial(lambda make: warmed(make(), x, y, steps), make))
        entry["setup_seconds"][variant] = round(time.perf_counter() - began, 1)
        if isinstance(made, str):
            entry["errors"][variant] = made
        else:
            runs[variant], results[variant] = made
    if "moeca" in runs:
        runs["moeca"].reset_stats()
    times = trajectories(runs, x, y, steps, rounds)
    for variant, other in results.items():
        if variant != "original" and "original" in results:
            error = (other.float() - results["original"].float()).norm() / results["original"].float().norm()
            entry[f"{variant}_relative_difference"] = float(error)
    entry["vectorised_speedup"] = ratio(times, "original", "vectorised")
    entry["moeca_speedup"] = ratio(times, "original", "moeca")
    entry["moeca_over_vectorised"] = ratio(times, "vectorised", "moeca")
    if "moeca" in runs:
        stats = runs["moeca"].stats()
        entry |= {"flops_speedup": round(stats.flops_speedup, 3), "reuse_ratio": round(stats.reuse_ratio, 4)}
        if entry["moeca_over_vectorised"]:
            entry["efficiency"] = round(entry["moeca_over_vectorised"] / stats.flops_speedup, 3)
    return entry | medians(times)


def warmed(model: Any, x: Tensor, y: Tensor, steps: int) -> tuple[Any, Tensor]:
    """The model and its result after one trajectory."""
    with torch.no_grad():
        result = trajectory(model, x, y, steps)
    return model, result


def milliseconds(run: Run) -> float:
    """One run between two CUDA events."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.no_grad():
        start.record()
        run()
        end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def trajectories(runs: dict[str, Any], x: Tensor, y: Tensor, steps: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of whole trajectories, taking turns, as many rounds as the time allows."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        began = time.perf_counter()
        names = list(runs)
        for name in names[turn % len(names) :] + names[: turn % len(names)] if names else []:
            times[name].append(milliseconds(partial(trajectory, runs[name], x, y, steps)))
        if left() < 2 * (time.perf_counter() - began):
            break
    return {name: each for name, each in times.items() if each}


# -- the whole ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def cleaned() -> Iterator[None]:
    """Free the GPU's memory afterwards."""
    try:
        yield
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def machine() -> dict[str, Any]:
    """The GPU and torch that the numbers were measured on."""
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = guarded(lambda: subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()[0])
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "driver": driver,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def environment() -> dict[str, Any]:
    """What the numbers were measured on."""
    import triton

    return machine() | {"triton": triton.__version__}


def time_kernels(name: str, batch: int, quick: bool) -> dict[str, Any]:
    """One shape and batch: checked in bf16 at batch 1, then timed."""
    with cleaned():
        verdict = check(Case(published(name), 1, torch.bfloat16, DEVICE))
        case = Case(published(name), batch, torch.bfloat16, DEVICE)
        rounds = 10 if quick else 30
        experts = guarded(lambda: time_experts(case, verdict, rounds, tune=not quick))
        others = guarded(lambda: time_others(case, verdict, rounds))
        entry = {"shape": name, "batch": batch, "checked": verdict, "experts": experts, "others": others}
    for each in experts if isinstance(experts, list) else []:
        print(
            f"{name:<12} batch {batch:>3} {each['fraction']:>5.0%} recomputed: {each['share_of_dense_rate']} of dense "
            f"rate, {each['faster_than_grouped_mm']}x grouped_mm, {each.get('experts_ms')} ms; whole site "
            f"{each.get('site_share_of_full')} of a full one",
            flush=True,
        )
    return entry


def time_model(name: str, batch: int, quick: bool) -> dict[str, Any]:
    """One model's trajectories, printed."""
    with cleaned(), torch.inference_mode(False):
        found = guarded(lambda: end_to_end(name, batch, 8 if quick else 12, 1 if quick else 3))
    entry: dict[str, Any] = {"model": name, "batch": batch, "error": found} if isinstance(found, str) else found
    wanted = ("vectorised_speedup", "moeca_speedup", "moeca_over_vectorised", "flops_speedup", "efficiency")
    told = ", ".join(f"{key} {entry[key]}" for key in wanted if entry.get(key) is not None)
    print(
        f"{name:<12} batch {batch:>3} end to end: {told or entry.get('error')} {entry.get('errors') or ''}", flush=True
    )
    return entry


def agenda(quick: bool) -> list[tuple[str, str, int, float]]:
    """What to do in order: kind, model, batch, and the seconds that must be left to begin it."""
    small: list[tuple[str, str, int, float]] = [("kernels", name, batch, 30) for batch in (1, 8) for name in NAMES]
    models = [("models", "dsmoe-s-e48", 8, 60.0), ("models", "dsmoe-l-e48", 8, 100.0)]
    if quick:
        return [each for each in small if each[1] in ("dsmoe-s-e48", "dsmoe-l-e48")] + models[:1]
    large = [("kernels", name, 125, 40.0) for name in NAMES]
    models_large = [("models", "dsmoe-s-e48", 125, 60.0), ("models", "dsmoe-l-e48", 125, 100.0)]
    rest = [("models", name, 8, 90.0) for name in ("dsmoe-s-e16", "dsmoe-l-e16")]
    rest += [("models", "dit-moe-xl", 8, 180.0)]  # building its 4 billion parameters takes a while
    return small + models + large + models_large + rest


def interpret() -> int:
    """Check every kernel on tiny shapes in Triton's interpreter; 1 when one is wrong."""
    wrong = 0
    for shape in TINY:
        for dtype in (torch.float32, torch.bfloat16):
            for name, found in check(Case(shape, 2, dtype, torch.device("cpu"))).items():
                wrong += isinstance(found, str)
                told = f"WRONG {found}" if isinstance(found, str) else f"ok, relative error {found:.1e}"
                print(f"{shape.name:<10} {str(dtype)[6:]:<9} {name:<11} {told}")
    return 1 if wrong else 0


def write(report: dict[str, Any], path: Path | None) -> None:
    """The report so far, whole or not at all."""
    report["seconds"] = round(time.perf_counter() - START, 1)
    if path is not None:
        part = path.with_suffix(".part")
        part.write_text(json.dumps(report, indent=1))
        part.replace(path)


def main() -> int:
    """Run the command; 0 when every kernel was right, 1 when one was wrong, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two shapes, batches 1 and 8, about 2 minutes")
    parser.add_argument("--out", type=Path, help="JSON file for all numbers")
    parser.add_argument("--interpret", action="store_true", help="only check the kernels, on a CPU")
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    if options.interpret:
        os.environ["TRITON_INTERPRET"] = "1"
        return interpret()
    if not torch.cuda.is_available():
        print("bench/gpu.py needs a CUDA GPU and found none; --interpret checks the kernels without one")
        return 2
    report: dict[str, Any] = {"environment": environment(), "kernels": [], "models": [], "dropped": []}
    for kind, name, batch, needed in agenda(options.quick):
        if left() < needed:
            report["dropped"].append(f"{kind} {name} batch {batch}: {left():.0f} s left of {BUDGET:.0f}")
            continue
        report[kind].append((time_kernels if kind == "kernels" else time_model)(name, batch, options.quick))
        write(report, options.out)
    write(report, options.out)
    for line in report["dropped"]:
        print(f"dropped: {line}")
    print(f"{report['environment']['device']}, torch {torch.__version__}, {time.perf_counter() - START:.0f} s")
    wrong = [name for each in report["kernels"] for name, found in each["checked"].items() if isinstance(found, str)]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
