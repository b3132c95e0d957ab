"""What this machine can do: the rates that a roofline is drawn with, measured in the same run."""

import platform
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from bench.cpu.timing import interleave, milliseconds

GEMM = (2048, 1024, 1024)
COPIED = 1 << 26  # floats: 256 MiB, more than any cache holds


def describe() -> dict[str, Any]:
    """Processor, versions and rates: GFLOP/s of an fp32 and a bf16 product, GB/s of a sum and of a copy (both ways)."""
    rows, inner, outputs = GEMM
    x, weight = torch.randn(rows, inner), torch.randn(outputs, inner)
    narrow_x, narrow_weight = x[:256].bfloat16(), weight.bfloat16()
    source, target = torch.randn(COPIED), torch.empty(COPIED)
    seconds = interleave(
        {
            "fp32": lambda: functional.linear(x, weight),
            "bf16": lambda: functional.linear(narrow_x, narrow_weight),
            "copy": lambda: target.copy_(source),
            "read": lambda: source.sum(),
        },
        5,
    )
    flops = 2 * rows * inner * outputs
    return {
        "processor": _processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "fp32_gflops": flops / milliseconds(seconds["fp32"]) / 1e6,
        "bf16_gflops": flops * 256 / rows / milliseconds(seconds["bf16"]) / 1e6,
        "read_gbytes": 4 * COPIED / milliseconds(seconds["read"]) / 1e6,
        "copy_gbytes": 8 * COPIED / milliseconds(seconds["copy"]) / 1e6,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
