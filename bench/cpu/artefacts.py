"""Exported steps: ONNX in onnxruntime against its own full step, AOTInductor against the compiled model.

Fractions are set as in `bench.cpu.steps`.
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import moeca_fx
from bench.cpu.steps import KEEP_MATCHED, cached_runs
from bench.cpu.timing import interleave, milliseconds, ratio
from moeca_fx.export import load, to_aotinductor, to_onnx
from moeca_fx.passes.lower_export import Experts
from moeca_fx.runtime.program import Program

FRACTIONS = (0.0, 0.1, 0.5)
FULL, PLAIN = "full step", "plain"
FORMS = ("one", "steps")
EXPERTS: tuple[Experts, ...] = ("padded", "unrolled")
Run = Callable[[], Any]


def bench_onnx(name: str, batch: int, rounds: int, experts: tuple[Experts, ...] = EXPERTS) -> Any:
    """Every form of an ONNX artefact: a cached step over its own full one, and that over a step of the plain model."""
    return {each: _bench_form(name, batch, rounds, each) for each in experts}


def _bench_form(name: str, batch: int, rounds: int, experts: Experts) -> Any:
    model, inputs = _model(name, batch)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        runs: dict[str, Run] = {}
        shares: dict[str, float] = {}
        for form, policy in (("one", KEEP_MATCHED), ("steps", KEEP_MATCHED), (PLAIN, None)):
            made = Path(folder, form)
            graphs = "auto" if form == PLAIN else form
            sizes = (1, batch, batch)
            to_onnx(model, made, inputs, policy=policy, batch=sizes, graphs=graphs, experts=experts, check=False)  # type: ignore[arg-type]  # two of the forms
            program = _program(made)
            if form == PLAIN:
                runs[PLAIN] = partial(program.run, "", batch, *inputs)
            else:
                found, shares = _runs(program, batch, inputs)
                runs |= {f"{form}: {key}": run for key, run in found.items()}
        seconds = interleave(runs, rounds, twice=True)
    full = {form: seconds[f"{form}: {FULL}"] for form in FORMS}
    return {
        "ms": {key: milliseconds(value) for key, value in seconds.items()},
        "of_full_step": {
            key: ratio(value, full[key.partition(":")[0]]) for key, value in seconds.items() if key != PLAIN
        },
        "flops_of_full_step": shares,
        "full_over_plain": {form: ratio(full[form], seconds[PLAIN]) for form in FORMS},
    }


def bench_aotinductor(name: str, batch: int, rounds: int) -> Any:
    """Packages over the compiled model's own steps; below 1 the package is faster."""
    model, inputs = _model(name, batch)
    fast = moeca_fx.transform(model, inputs, policy=KEEP_MATCHED)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        to_aotinductor(model, folder, inputs, policy=KEEP_MATCHED, batch=(1, batch, batch), check=False)
        compiled, _ = _runs(next(iter(fast._moeca.programs.values())), batch, inputs)
        package, _ = _runs(_program(Path(folder)), batch, inputs)
        runs = {f"compiled: {key}": run for key, run in compiled.items()}
        runs |= {f"package: {key}": run for key, run in package.items()}
        seconds = interleave(runs, rounds, twice=True)
    return {
        "ms": {key: milliseconds(value) for key, value in seconds.items()},
        "of_compiled": {key: ratio(seconds[f"package: {key}"], seconds[f"compiled: {key}"]) for key in compiled},
    }


def _model(name: str, batch: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return moeca_fx.zoo.build(name), tuple(moeca_fx.zoo.example_inputs(name, batch))


def _program(folder: Path) -> Program:
    return load(folder)._runtime.artefact


def _runs(program: Program, batch: int, inputs: tuple[Tensor, ...]) -> tuple[dict[str, Run], dict[str, float]]:
    """A full step and a cached one of each fraction; FLOPs of those over a full one's."""
    graphs = program.graphs
    assert graphs is not None
    empty = [torch.full((batch, *state.shape), state.empty, dtype=state.dtype) for state in graphs.states]
    carried = [tensor for tensor, state in zip(empty, graphs.states, strict=True) if state.carried]
    count = len(graphs.states)
    states = list(program.run("full", batch, *inputs, *carried)[program.outputs : program.outputs + count])
    flops = program.step_flops(list(inputs), batch)
    runs, shares = cached_runs(program, states, flops, inputs, batch, FRACTIONS)
    return {FULL: lambda: program.run("full", batch, *inputs, *carried)} | runs, shares
