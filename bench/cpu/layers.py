"""One MoE layer of every published shape: fused experts against the share of branches, and against tokens times k."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.cpu.timing import interleave, milliseconds, ratio
from moeca_fx.kernels.cpu import ops as kernels
from moeca_fx.zoo.catalog import config_of
from moeca_fx.zoo.dsmoe_config import DSMoEConfig

NAMES = ("dsmoe-s-e16", "dsmoe-s-e48", "dsmoe-l-e16", "dsmoe-l-e48", "dit-moe-xl")
FRACTIONS = (0.0, 0.05, 0.1, 0.25, 0.5, 1.0)
TOKENS = (256, 512, 1024, 2048)
SILU = 0


def sizes_of(name: str) -> tuple[int, int, int, int, int]:
    """(width, expert width, experts, top-k, tokens) of a zoo model."""
    config = config_of(name)
    tokens = (config.input_size // config.patch_size) ** 2
    inner = config.expert_width if isinstance(config, DSMoEConfig) else config.hidden_size * config.mlp_ratio
    return config.hidden_size, inner, config.num_experts, config.top_k, tokens


def bench_layer(name: str, batch: int, rounds: int) -> Any:
    """Fused experts of one layer with random weights: fractions of the branches, and numbers of tokens."""
    require_kernels()
    width, inner, experts, top_k, tokens = sizes_of(name)
    weights = _weights(experts, width, inner)
    rows = batch * tokens
    x, expert = _routing(rows, width, experts, top_k)
    feature, norm = torch.zeros(batch, tokens, top_k, width), torch.zeros(batch, tokens, top_k)
    runs: dict[str, Callable[[], Any]] = {}
    hit: dict[str, int] = {}
    for fraction in FRACTIONS:
        generator = torch.Generator().manual_seed(1)
        code = (torch.rand(batch, tokens, top_k, generator=generator) < fraction).to(torch.int8)
        shaped = expert.view(code.shape)
        hit[f"{fraction:.0%}"] = len(shaped[code > 0].unique())
        runs[f"{fraction:.0%}"] = lambda code=code, shaped=shaped: kernels.recompute_branches(  # type: ignore[misc]
            feature, norm, x, code, shaped, None, *weights
        )
    with torch.no_grad():
        seconds = interleave(runs, rounds)
    flops = 6 * rows * top_k * width * inner
    return {
        "model": name,
        "batch": batch,
        "ms": {key: milliseconds(value) for key, value in seconds.items()},
        "of_all": {key: ratio(value, seconds["100%"]) for key, value in seconds.items()},
        "gflops": flops / milliseconds(seconds["100%"]) / 1e6,
        "experts_hit": hit,
        "experts": experts,
        "weight_bytes": sum(w.numel() * w.element_size() for w in weights if isinstance(w, Tensor)),
        "feature_bytes": feature.numel() * feature.element_size(),
        "flops": flops,
    }


def bench_linearity(name: str, rounds: int) -> Any:
    """Time of all experts for growing numbers of tokens, as a multiple of what the smallest number's would give."""
    require_kernels()
    width, inner, experts, top_k, _ = sizes_of(name)
    weights = _weights(experts, width, inner)
    runs: dict[str, Callable[[], Any]] = {}
    for tokens in TOKENS:
        x, expert = _routing(tokens, width, experts, top_k)
        runs[str(tokens)] = lambda x=x, expert=expert: torch.ops.moeca_cpu.branches(x, expert, *weights)  # type: ignore[misc]
    with torch.no_grad():
        seconds = interleave(runs, rounds)
    first = seconds[str(TOKENS[0])]
    return {
        "model": name,
        "ms": {key: milliseconds(value) for key, value in seconds.items()},
        "of_linear": {key: ratio(value, first) * TOKENS[0] / int(key) for key, value in seconds.items()},
    }


def require_kernels() -> None:
    """Build and load the kernels that are timed."""
    if not kernels.available():
        raise SystemExit("the layers section times the CPU kernels, which need a C++ compiler (g++ or clang++)")


def _weights(experts: int, width: int, inner: int) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)

    def draw(outputs: int, inputs: int) -> Any:
        return torch.randn(experts, outputs, inputs, generator=generator) / inputs**0.5

    return (draw(inner, width), None, draw(inner, width), None, draw(width, inner), None, SILU)


def _routing(rows: int, width: int, experts: int, top_k: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, width, generator=generator)
    return x, torch.rand(rows, experts, generator=generator).topk(top_k).indices
