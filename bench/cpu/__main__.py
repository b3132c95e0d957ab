"""The CPU benchmark, in one process: ratios of interleaved repeats, first a table, then all numbers as JSON.

    python -m bench.cpu                        steps, layers, trajectories, transform; 15 minutes at first
    python -m bench.cpu --only export          exported steps; some 20 minutes, most of them exporting
    python -m bench.cpu --only storage         trajectories with caches in the model's dtype and in bf16; 10 minutes
    python -m bench.cpu --only steps           one section
    python -m bench.cpu --all                  every policy in the trajectories; half an hour
    python -m bench.cpu --out FILE.json        where the numbers go (default out/bench-cpu.json)

Most of the time is compilation, which the compiler's cache spares a second run. Nothing else should run meanwhile.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bench.cpu.layers import NAMES, bench_layer, bench_linearity
from bench.cpu.machine import describe
from bench.cpu.steps import bench_steps
from bench.cpu.trajectories import bench_trajectories
from bench.cpu.transforming import bench_transform

MODEL, BATCH, LARGE = "dsmoe-s-e48", 4, "dsmoe-l-e48"
USUAL = ("moeca", "fora", "toca", "taylorseer", "forecast", "best-4x", "branch-4x")
ON_GLYPHS = ("moeca", "best-4x", "branch-4x")
OF_BRANCHES = ("moeca", "branch-4x")
OUT = Path("out/bench-cpu.json")
Section = Callable[[argparse.Namespace], Iterator[tuple[str, Any]]]


def steps(options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """One model in fp32 with cached steps at every fraction, and uncached in bf16."""
    yield "fp32", bench_steps(MODEL, BATCH, torch.float32, options.rounds, original=True, fractions=True)
    yield "bf16", bench_steps(MODEL, BATCH, torch.bfloat16, 3, original=False, fractions=False)


def layers(options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """One layer of every shape."""
    for name in NAMES:
        for batch in (1, BATCH):
            yield f"{name} batch {batch}", bench_layer(name, batch, options.rounds)
    yield "linearity", bench_linearity(MODEL, options.rounds)


def trajectories(options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Every policy on the trained models."""
    yield "digits", bench_trajectories("digits", 32, options.rounds, () if options.all else USUAL)
    yield "glyphs", bench_trajectories("glyphs", 8, options.rounds, () if options.all else ON_GLYPHS)


def storage(options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """What caches in bf16 do to the time of policies that hold branches."""
    for name, batch in (("digits", 32), ("glyphs", 8)):
        yield name, bench_trajectories(name, batch, options.rounds, OF_BRANCHES, stored="bf16")


def transform(options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Time and memory of `transform` on a large model."""
    yield LARGE, bench_transform(LARGE)


def export(options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Exported steps: ONNX in onnxruntime, packages of AOTInductor."""
    from bench.cpu.artefacts import bench_aotinductor, bench_onnx  # of an extra

    for name, batch in (("digits", 8), ("digits", 32), (MODEL, BATCH)):
        yield f"onnx {name} batch {batch}", bench_onnx(name, batch, options.rounds)
        yield f"aoti {name} batch {batch}", bench_aotinductor(name, batch, options.rounds)


SECTIONS: dict[str, Section] = {
    "steps": steps,
    "layers": layers,
    "trajectories": trajectories,
    "transform": transform,
    "storage": storage,
    "export": export,
}
USUALLY = ("steps", "layers", "trajectories", "transform")


def main() -> None:
    """Run the chosen sections; the file is written after each part."""
    parser = argparse.ArgumentParser(prog="python -m bench.cpu", description="Benchmark moeca_fx on this CPU.")
    parser.add_argument("--only", choices=SECTIONS, action="append", help="a section; may be given several times")
    parser.add_argument("--all", action="store_true", help="every policy")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved repeats (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--out", type=Path, default=OUT, help=f"JSON file (default {OUT})")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    start = time.perf_counter()
    found: dict[str, Any] = {"date": datetime.now(UTC).date().isoformat(), "machine": describe()}
    _say(f"{found['machine']}")
    for section in options.only or USUALLY:
        found[section] = {}
        for part, numbers in SECTIONS[section](options):
            found[section][part] = numbers
            found["minutes"] = (time.perf_counter() - start) / 60
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(found, indent=1) + "\n")
            _say(f"\n{section}: {part}")
            _say(_table(section, numbers))
            torch._dynamo.reset()
            gc.collect()
    _say(f"\n{found['minutes']:.1f} minutes; all numbers: {options.out}")


def _table(section: str, numbers: Any) -> str:
    if section == "steps":
        return _steps_table(numbers)
    if section in ("trajectories", "storage"):
        rows = [f"{'policy':<20}{'time':>9}{'FLOPs':>9}{'efficiency':>12}{'over original':>15}"]
        for name, row in numbers["policies"].items():
            rows.append(
                f"{name:<20}{row['speedup']:>8.2f}x{row['flops_speedup']:>8.2f}x{row['efficiency']:>12.2f}"
                f"{row['over_original']:>14.2f}x"
            )
        return "\n".join(rows)
    return "\n".join(f"{key:<16}{_short(value)}" for key, value in numbers.items())


def _steps_table(numbers: Any) -> str:
    rows = [f"{'':<20}{'ms':>8}{'over eager original':>21}{'of a full step':>16}{'its FLOPs':>11}{'over':>8}"]
    for name, ms in numbers["ms"].items():
        row = f"{name:<20}{ms:>8.1f}{numbers['over_original'][name]:>20.2f}x"
        if name in numbers["of_full_step"]:
            share = numbers["flops_of_full_step"].get(name)
            row += f"{numbers['of_full_step'][name]:>16.3f}"
            row += f"{share:>11.3f}{numbers['of_full_step'][name] - share:>+8.3f}" if share is not None else ""
        rows.append(row)
    if numbers["over_original_compiled"]:
        rows.append(f"vectorised over the compiled original: {numbers['over_original_compiled']:.2f}x")
    return "\n".join(rows)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{key}: {_short(item)}" for key, item in value.items())
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
