"""``moeca-fx tune TARGET``: search a policy for a zoo model and write it as YAML."""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from moeca_fx.cli.console import stderr, stdout
from moeca_fx.cli.flow import flow_of
from moeca_fx.cli.target import HELP, load_target
from moeca_fx.errors import InputError, TargetNotMetError, require
from moeca_fx.files import prepare_folder
from moeca_fx.policies import save
from moeca_fx.tuning import parse_target
from moeca_fx.tuning import tune as search
from moeca_fx.tuning.search import Sampler, Tuned
from moeca_fx.zoo.sampling import sample

VALIDATION_SEED, HELD_OUT_SEED = 2_000_029, 3_000_017
"""Added to the seed of the latents; no sum of it and `FRESH_NOISE`."""


def tune(
    target: Annotated[str, typer.Argument(metavar="TARGET", help=HELP)],
    goal: Annotated[str, typer.Option(help="e.g. 3x, 40dB, 40dB,500MB, or 500MB (at 3x).")] = "3x",
    weights: Annotated[str | None, typer.Option(help="Weights: a local file or a hub id.")] = None,
    level: Annotated[str, typer.Option(help="any, output or branch.")] = "any",
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 50,
    sampler: Annotated[str, typer.Option(help="euler or ancestral.")] = "euler",
    batch: Annotated[int, typer.Option(help="Latents to calibrate with, as many to choose by, and to report.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the latents.")] = 0,
    seconds: Annotated[float, typer.Option(help="No new trial starts after this time.")] = 600.0,
    out: Annotated[Path, typer.Option(help="The policy file.")] = Path("out/policy.yaml"),
    log: Annotated[
        Path | None,
        typer.Option(help="Finished trials; an interrupted search resumes from it.", show_default="beside --out"),
    ] = None,
) -> None:
    """Calibrate and choose on latents of even classes; measure on others of odd classes; write a policy file."""
    wanted = parse_target(goal)
    if steps < 4 or batch < 2:
        raise InputError(f"--steps must be at least 4 and --batch at least 2, found {steps} and {batch}")
    if out.suffix not in (".yaml", ".yml"):
        raise InputError(f"--out: expected a file name ending in .yaml, found {out.name!r}")
    for package, extra in (("yaml", "cli"), ("torchmetrics", "demo")):
        require(package, extra)
    prepare_folder(out.parent)
    loaded = load_target(target, weights)
    flow = flow_of(target, loaded.model)
    shape = loaded.inputs[0].shape[1:]

    def latents(first_class: int, latent_seed: int) -> Sampler:
        noise = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(latent_seed))
        labels = (2 * torch.arange(batch) + first_class) % (flow.num_classes // 2 * 2 or 1)

        def run(model: Any) -> Tensor:
            return sample(flow.velocity(model), noise, labels, steps, sampler=sampler, seed=latent_seed)

        return run

    progress = stderr()
    found = search(
        loaded.model,
        latents(0, seed),
        wanted,
        held_out=latents(1, seed + HELD_OUT_SEED),
        validation=latents(0, seed + VALIDATION_SEED),
        level=level,  # type: ignore[arg-type]  # checked by the search
        seconds=seconds,
        sampler_name=sampler,
        log_file=log or out.with_suffix(".trials.jsonl"),
        progress=lambda text: progress.print(text, highlight=False, soft_wrap=True),
    )
    save(found.method, out, comment=f"{target}, {steps} {sampler} steps: {_summary(found)}")
    if not found.met:
        raise TargetNotMetError(
            f"target {wanted} was not met on held-out latents; the best found is in {out}: {_summary(found)}; ask for "
            "less, or give the search more --seconds or a larger --batch"
        )
    stdout().print(f"{_summary(found)}\npolicy {out}", highlight=False, soft_wrap=True)


def _summary(found: Tuned) -> str:
    held = found.held_out
    assert held is not None, "this command always measures on held-out latents"
    return (
        f"{found.method.method}, {held.speedup:.2f}x fewer FLOPs, {held.psnr:.1f} dB, {held.cache_bytes / 1e6:.1f} MB "
        f"of cache on held-out latents ({found.calibration.psnr:.1f} dB where it was chosen, {found.trials} trials)"
    )
