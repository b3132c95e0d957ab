"""Builds TensorRT engines of zoo models, checks each against PyTorch and times it; needs one NVIDIA GPU, no network.

    python bench/engine_gpu.py --out engine.json     all models; most of the time is tracing, on one CPU core
    python bench/engine_gpu.py --model digits        one of them; several --model are run in turn
    python bench/engine_gpu.py --keep DIR            leaves graphs and engines there, and takes those that are there
    python bench/engine_gpu.py --build-only          no GPU: builds, and compares inputs and outputs with the manifest

For every model and dtype: (1) engines of a model with caches (MoECa), of one that keeps every match (so that a chosen
fraction is recomputed), and without caches; (2) 12 steps of a trajectory at batches 1, 2 and 5 against PyTorch on the
same GPU: results, decisions, statistics; (3) the same in onnxruntime's GPU providers, where they are; (4) times of
steps with CUDA events, in turns, each ratio the median of the ratios within a round. TF32 is off everywhere. A model
that fails is reported, the others go on; the exit code is then 1. 2 means that there is no GPU or no TensorRT.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # read by cuBLAS, cuDNN and TensorRT when they start
os.environ["MOECA_FX_GPU_KERNELS"] = "0"  # the reference is PyTorch's own operations
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

import moeca_fx
from bench.cpu.steps import KEEP_MATCHED, share_of_full, without_experts
from bench.gpu import cleaned, guarded, interleaved, machine, medians, ratio, write
from moeca_fx.errors import ExportError, MoecaError
from moeca_fx.export import ExportedModel, Manifest, load, to_onnx
from moeca_fx.export.api import build_engines
from moeca_fx.export.engine import BACKENDS, find_backend, parse_capabilities
from moeca_fx.export.manifest import FILE, read_manifest
from moeca_fx.export.onnx.whole import Lengths
from moeca_fx.export.plan import ExportPlan, build_plan
from moeca_fx.export.verify import trajectory, verify
from moeca_fx.policies import Method
from moeca_fx.runtime.module import TransformedModel
from moeca_fx.runtime.statistics import Statistics

MODELS = ("digits", "dsmoe-s-e48", "dsmoe-s-e16", "dit-moe-s")
DTYPES = ("float32", "float16", "bfloat16")
PROVIDERS = ("CUDAExecutionProvider", "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider")
GIVEN = "moeca given lengths"
POLICIES: dict[str, Method | None] = {"moeca": moeca_fx.MoECa(), "keep matched": KEEP_MATCHED, "none": None}
FRACTIONS = (0.0, 0.1, 0.5)
SIZES = (1, 2, 8)
BATCHES = (1, 2, 5)
STEPS = 12
DEVICE = torch.device("cuda")
Inputs = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Job:
    """One model in one dtype."""

    name: str
    dtype: str
    folder: Path
    backend: Any
    capabilities: tuple[str, ...]

    def place(self, kind: str, policy: str) -> Path:
        """Folder of the ``onnx`` or ``engine`` artefact of a policy."""
        return self.folder / f"{self.name}-{self.dtype}" / f"{policy.replace(' ', '-')}-{kind}"

    def model(self, device: torch.device) -> tuple[torch.nn.Module, Inputs]:
        """The model and a call of two, in the job's dtype."""
        dtype = getattr(torch, self.dtype)
        x, t, y = moeca_fx.zoo.example_inputs(self.name, 2)
        return moeca_fx.zoo.build(self.name).to(device, dtype), (x.to(device, dtype), t.to(device, dtype), y.to(device))


# -- building -------------------------------------------------------------------------------------------------------


def build(job: Job, policy: str) -> dict[str, Any]:
    """Graph and engine of a policy, those that are there already left alone; what was built and how long it took."""
    source, made = job.place("onnx", policy), job.place("engine", policy)
    entry: dict[str, Any] = {}
    if not (source / FILE).exists():
        began = time.perf_counter()
        export(job, source, POLICIES["moeca" if policy == GIVEN else policy], "input" if policy == GIVEN else "range")
        entry["onnx_seconds"] = round(time.perf_counter() - began, 1)
    if not (made / FILE).exists():
        made.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        build_engines(source, made, backend=job.backend, compute_capabilities=job.capabilities)
        entry["engine_seconds"] = round(time.perf_counter() - began, 1)
    manifest = read_manifest(made)
    tensors = {way: sum(len(graph[way]) for graph in manifest.graphs) for way in ("inputs", "outputs")}
    size = sum((made / graph["file"]).stat().st_size for graph in manifest.graphs)
    entry |= {"kind": manifest.kind, "engines": len(manifest.graphs), "engine_bytes": size, **tensors}
    return entry | {"compute_capabilities": manifest.compute_capabilities, "matches_manifest": True}


def export(job: Job, folder: Path, policy: Method | None, lengths: Lengths = "range") -> Manifest:
    """The ONNX artefact; raises where another dtype came out than was asked for."""
    model, inputs = job.model(torch.device("cpu"))
    manifest = to_onnx(
        model, folder, inputs, policy=policy, batch=SIZES, check=False, experts="padded", lengths=lengths
    )
    if manifest.dtype != job.dtype:
        raise ExportError(f"{job.name}: expected an export in {job.dtype}, found {manifest.dtype}")
    return manifest


# -- checking -------------------------------------------------------------------------------------------------------


def reference(job: Job) -> tuple[TransformedModel, ExportPlan]:
    """The transformed model on the GPU, without compilation, and the plan whose trajectories both are given."""
    model, inputs = job.model(DEVICE)
    fast = moeca_fx.transform(model, inputs, policy=POLICIES["moeca"], compile=False)
    model, host = job.model(torch.device("cpu"))
    plan = build_plan(moeca_fx.transform(model, host, policy=POLICIES["moeca"], compile=False))
    return fast, replace(plan, inputs=dict(zip(plan.inputs, inputs, strict=True)))


def check(artefact: ExportedModel, fast: TransformedModel, plan: ExportPlan) -> dict[str, Any]:
    """Results and statistics over `STEPS` steps at every batch; ``passed`` says whether both are right."""
    found = verify(artefact, fast, plan, SIZES, batches=BATCHES, steps=STEPS)
    equal, reused = [], []
    for batch in BATCHES:
        own, other = (counted(model, plan, batch) for model in (artefact, fast))
        equal.append(own == other)
        reused.append([round(own.reuse_ratio, 5), round(other.reuse_ratio, 5)])
    # After a tie the two may rightly count differently.
    right = found.passed and (all(equal) or found.agreeing < 1)
    return {
        "passed": right,
        "relative_error": found.error,
        "tied_share": found.tied,
        "agreeing_share": found.agreeing,
        "steps": found.steps,
        "statistics_equal": equal,
        "reuse_ratio_here_and_in_torch": reused,
    }


def counted(model: ExportedModel | TransformedModel, plan: ExportPlan, batch: int) -> Statistics:
    """Statistics of one trajectory."""
    model.reset()
    model.reset_stats()
    for inputs in trajectory(plan, batch, STEPS):
        model(*inputs)
    return model.stats()


def check_provider(provider: str, folder: Path, fast: TransformedModel, plan: ExportPlan) -> dict[str, Any]:
    """The ONNX artefact in one of onnxruntime's providers: ``run`` and its check, or why it is ``missing``."""
    try:
        artefact = load(folder, providers=(provider,))
    except MoecaError as error:
        return {"state": "missing", "reason": str(error)}
    found = guarded(lambda: check(artefact, fast, plan))
    return {"state": "failed", "reason": found} if isinstance(found, str) else {"state": "run", **found}


# -- timing ---------------------------------------------------------------------------------------------------------


def time_steps(job: Job, batch: int, rounds: int) -> dict[str, Any]:
    """Full, cached and uncached steps of the engines on one call, in turns."""
    cached, plain = (load(job.place("engine", policy)) for policy in ("keep matched", "none"))
    inputs = tuple(value[torch.arange(batch) % 2] for value in job.model(torch.device("cpu"))[1])
    call = tuple(value.to(DEVICE).contiguous() for value in inputs)
    runs, share = step_runs(cached, plain, call, batch)
    times = interleaved(runs, rounds)
    return {
        "batch": batch,
        "rounds": rounds,
        "flops_of_full_step": share,
        "of_full_step": {name: ratio(times, name, "full") for name in runs},
        "of_plain": {name: ratio(times, name, "plain") for name in runs},
        **medians(times),
    }


def step_runs(
    cached: ExportedModel, plain: ExportedModel, call: tuple[Tensor, ...], batch: int
) -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
    """A run for each kind of step, and the FLOPs of the cached ones over a full step's."""
    program, uncached = cached._runtime.artefact, plain._runtime.artefact
    states, rule = cached.manifest.states, cached.manifest.steps[-1]["name"]
    assert program.graphs is not None
    empty = [torch.full((batch, *s.shape), s.empty, dtype=s.dtype, device=DEVICE) for s in states]
    first = program.run("full", batch, *call, *empty)
    held = [value.clone() for value in first[program.outputs : program.outputs + len(states)]]
    runs: dict[str, Callable[[], Any]] = {
        "plain": lambda: uncached.run("", batch, *call),
        "full": lambda: program.run("full", batch, *call, *held),
    }
    share: dict[str, float] = {}
    flops = cached.manifest.step_flops(batch)
    for fraction in FRACTIONS:
        pairs = zip(states, held, strict=True)
        own = [without_experts(value, fraction) if state.kind == "expert" else value.clone() for state, value in pairs]
        name = f"cached {fraction:.0%}"
        runs[name] = lambda own=own: program.run(rule, batch, *call, *own)  # type: ignore[misc]
        counts = dict(zip(program.graphs.rules[0].counters, runs[name]()[-1].tolist(), strict=True))
        share[name] = share_of_full(flops, counts)
    return runs, share


# -- the whole ------------------------------------------------------------------------------------------------------


def model_report(job: Job, rounds: int, batches: tuple[int, ...], build_only: bool) -> dict[str, Any]:
    """Everything of one model; what fails is text under ``failed``, and what needs it is left out."""
    entry: dict[str, Any] = {"model": job.name, "dtype": job.dtype, "built": {}, "failed": {}}

    def part(name: str, run: Callable[[], Any]) -> Any:
        found = guarded(run)
        if isinstance(found, str):
            entry["failed"][name] = found
            return None
        return found

    for policy in (*POLICIES, GIVEN) if not build_only else ("moeca", "none"):
        entry["built"][policy] = part(f"build {policy}", partial(build, job, policy))
    if build_only:
        return entry
    found = part("reference", lambda: reference(job))
    if found is not None:
        made = {"engine": "moeca", "engine with given lengths": GIVEN}
        checks = {
            name: lambda policy=policy: check(load(job.place("engine", policy)), *found)
            for name, policy in made.items()
        }
        entry["checked"] = {name: part(f"check {name}", run) for name, run in checks.items()}
        source = job.place("onnx", "moeca")
        entry["providers"] = {name: part(name, partial(check_provider, name, source, *found)) for name in PROVIDERS}
        wrong = [name for name, each in (entry["checked"] | entry["providers"]).items() if each and not right(each)]
        entry["failed"] |= dict.fromkeys(wrong, "differs from PyTorch, see its numbers")
    entry["timed"] = [part(f"time batch {batch}", partial(time_steps, job, batch, rounds)) for batch in batches]
    return entry


def right(checked: dict[str, Any]) -> bool:
    """Whether a check passed, or could not be made because what it needs is not installed."""
    return checked.get("state") == "missing" or bool(checked.get("passed"))


def tell(entry: dict[str, Any]) -> None:
    """What was found of one model, a line each."""
    title = f"{entry['model']} {entry['dtype']}"
    for policy, built in entry["built"].items():
        if built is not None:
            size = f"{built['engine_bytes'] / 2**20:.0f} MiB"
            ports = f"{built['inputs']} inputs and {built['outputs']} outputs as in the manifest"
            print(f"{title}: {policy}: {built['engines']} {built['kind']} engine, {size}, {ports}")
    for name, checked in (entry.get("checked", {}) | entry.get("providers", {})).items():
        if checked is not None:
            print(f"{title}: {name}: {', '.join(f'{key} {value}' for key, value in checked.items())}")
    for timed in filter(None, entry.get("timed", [])):
        print(f"{title}: batch {timed['batch']}: of a plain step {timed['of_plain']}")
        print(f"{title}: batch {timed['batch']}: of a full step {timed['of_full_step']}")
    for name, why in entry["failed"].items():
        print(f"{title}: FAILED {name}: {why}")
    sys.stdout.flush()


def environment(backend: Any, build_only: bool) -> dict[str, Any]:
    """What the numbers were measured on."""
    import onnx
    import onnxruntime

    name, module = find_backend(backend)
    versions = {name: module.__version__, "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}
    built = {"torch": torch.__version__, "date": datetime.now(UTC).isoformat(timespec="seconds")}
    facts = built if build_only else machine() | {"capability": capability()}
    return facts | versions | {"moeca_fx": moeca_fx.__version__, "tf32": False}


def capability() -> str:
    """The GPU's compute capability."""
    return ".".join(str(part) for part in torch.cuda.get_device_capability(DEVICE))


def parse() -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s [options]"
    )
    parser.add_argument("--model", choices=MODELS, action="append", help="a model; may be given several times")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="of the model (float32); may be given again")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="which TensorRT; auto prefers the full one")
    parser.add_argument("--batch", type=int, action="append", help="samples of a timed step (1 and 8)")
    parser.add_argument("--rounds", type=int, default=20, help="interleaved repeats (default 20)")
    parser.add_argument("--out", type=Path, help="JSON file for all numbers")
    parser.add_argument("--keep", type=Path, help="folder for graphs and engines; those that are there are used")
    parser.add_argument("--build-only", action="store_true", help="build and compare with the manifest; no GPU")
    parser.add_argument(
        "--compute-capability", default="8.9", help="of the GPUs that --build-only builds for (default 8.9)"
    )
    return parser.parse_args()


def main() -> int:
    """Run the command; 0 when everything was right, 1 when something failed, 2 without a GPU or TensorRT."""
    options = parse()
    if not options.build_only and not torch.cuda.is_available():
        print(
            "bench/engine_gpu.py needs an NVIDIA GPU and a torch that was built for CUDA, and found none; --build-only "
            "builds engines without one"
        )
        return 2
    try:
        backend, _ = find_backend(options.backend)
        capabilities = parse_capabilities(options.compute_capability) if options.build_only else ()
    except MoecaError as error:
        print(f"bench/engine_gpu.py: {error}")
        return 2
    report: dict[str, Any] = {"environment": environment(backend, options.build_only), "models": []}
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.model or MODELS:
            for dtype in options.dtype or DTYPES[:1]:
                job = Job(name, dtype, options.keep or Path(temporary), backend, capabilities)
                entry = run(job, options)
                tell(entry)
                failed |= bool(entry["failed"])
                report["models"].append(entry)
                write(report, options.out)
    return 1 if failed else 0


def run(job: Job, options: argparse.Namespace) -> dict[str, Any]:
    """One model's report, on a stream of its own: on the default one TensorRT waits for the whole device."""
    batches = tuple(options.batch or (1, 8))
    if options.build_only:
        return model_report(job, options.rounds, batches, True)
    with cleaned(), torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
        return model_report(job, options.rounds, batches, False)


if __name__ == "__main__":
    sys.exit(main())
