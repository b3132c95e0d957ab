"""Whole trajectories of the trained models: what a policy saves in FLOPs, and what of it is saved in time.

Efficiency is latency speed-up over FLOPs speed-up, both over the vectorised, compiled, uncached model in the same
rounds; 1 means that every saved FLOP saved its time.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import moeca_fx
from bench.cpu.timing import interleave, milliseconds, ratio
from moeca_fx import policies
from moeca_fx.graph.storage import CacheDtype
from moeca_fx.runtime.module import TransformedModel
from moeca_fx.zoo.catalog import TRAINED
from moeca_fx.zoo.sampling import sample

STEPS = 50


def methods(name: str) -> dict[str, Any]:
    """Policies by label: every published one, and those that ship beside the model."""
    needs = {"toca": {"steps": STEPS}, "duca": {"steps": STEPS}, "teacache": {"steps": STEPS}}
    found: dict[str, Any] = {
        label: policies.build(label, **needs.get(label, {})) for label in policies.names() if label != "calibrated"
    }
    beside = Path(TRAINED[name]).parent if name == "digits" else Path(moeca_fx.zoo.__file__).parent / name
    return found | {path.stem: path for path in sorted(beside.glob("*.yaml"))}


def bench_trajectories(
    name: str, batch: int, rounds: int, only: tuple[str, ...] = (), stored: CacheDtype | None = None
) -> Any:
    """Times and FLOPs of every policy, or of `only` some, on one trained model, Euler steps.

    Args:
        stored: a `cache_dtype`, with which every policy runs a second time.
    """
    model = moeca_fx.zoo.build(name)
    example = moeca_fx.zoo.example_inputs(name, batch)
    noise = torch.randn(example[0].shape, generator=torch.Generator().manual_seed(90_210))
    config: Any = model.config
    labels = torch.arange(batch) % config.num_classes
    vectorised = moeca_fx.transform(model, example, policy=None)
    models: dict[str, nn.Module] = {"original": model, "vectorised": vectorised}
    narrow = moeca_fx.transform(model, example, policy=None, cache_dtype=stored) if stored else None
    for label, method in methods(name).items():
        if not only or label in only:
            models[label] = vectorised.with_policy(method)
            if narrow is not None:
                models[f"{label}, {stored}"] = narrow.with_policy(method)
    runs: dict[str, Callable[[], Any]] = {key: partial(_draw, own, noise, labels) for key, own in models.items()}
    with torch.no_grad():
        for own in models.values():
            _draw(own, noise, labels)
            if own is not model:
                own.reset_stats()  # type: ignore[operator]  # a transformed model's
        seconds = interleave(runs, rounds)
    rows = {}
    for key, own in models.items():
        if key != "original":
            statistics = own.stats()  # type: ignore[operator]
            speedup = ratio(seconds["vectorised"], seconds[key])
            rows[key] = {
                "ms": milliseconds(seconds[key]),
                "over_original": ratio(seconds["original"], seconds[key]),
                "speedup": speedup,
                "flops_speedup": statistics.flops_speedup,
                "efficiency": speedup / statistics.flops_speedup,
                "cached_share": statistics.cached_steps / (statistics.cached_steps + statistics.full_steps),
                "cache_bytes": own.memory().total,  # type: ignore[operator]
            }
    return {
        "model": name,
        "batch": batch,
        "steps": STEPS,
        "original_ms": milliseconds(seconds["original"]),
        "policies": rows,
    }


def _draw(model: nn.Module, noise: Tensor, labels: Tensor) -> Tensor:
    if isinstance(model, TransformedModel):
        model.reset()
    return sample(lambda x, t, y: model(x, t, y)[0], noise, labels, STEPS)
