"""Calibrate the policies that docs/results.md compares: ``python docs/recommend.py MODEL --steps 50 --sampler euler``.

One recorded run of even classes serves all speed-ups. For each, a calibrated forecast of the output is written
(``OUT/MODEL/SAMPLER-STEPS/best-3x.yaml``), and with ``--levels output branch`` a forecast of expert branches on a
calibrated schedule (``branch-3x.yaml``).
"""

import argparse
from pathlib import Path

import torch

import moeca_fx
from moeca_fx import policies
from moeca_fx.calibration.polish import image_loss
from moeca_fx.tuning.candidates import BranchCandidates, BranchVariant, OutputCandidates, fewer_full
from moeca_fx.tuning.target import SLACK
from moeca_fx.zoo.sampling import sample

TARGETS = (2.0, 3.0, 4.0, 6.0)
VARIANTS = (BranchVariant(1, 0.05), BranchVariant(1, 0.2))


def main() -> None:
    """Record once, write one policy file a target."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--sampler", default="euler")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tries", type=int, default=30, help="moves of one full step that are tried")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--levels", nargs="+", choices=("output", "branch"), default=["output"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("out/policies"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    model = moeca_fx.zoo.build(options.model)
    config = model.config
    noise = torch.randn(
        options.batch,
        config.in_channels,
        config.input_size,
        config.input_size,
        generator=torch.Generator().manual_seed(options.seed),
    )
    labels = 2 * torch.arange(options.batch) % (config.num_classes // 2 * 2)

    def sampler(run):
        return sample(run, noise, labels, options.steps, sampler=options.sampler, seed=options.seed)

    example = (noise, torch.zeros(options.batch), labels)
    plain = moeca_fx.transform(model, example, policy=None, compile=False)
    output = OutputCandidates(model, plain, sampler, fewest=1 / max(TARGETS))
    folder = options.out / options.model / f"{options.sampler}-{options.steps}"
    folder.mkdir(parents=True, exist_ok=True)
    note = (
        f"{options.model}, {options.steps} {options.sampler} steps; python docs/recommend.py, {options.batch} latents"
    )
    if "output" in options.levels:
        write_output_policies(output, options.sampler, options.tries, folder, note)
    if "branch" in options.levels:
        write_branch_policies(BranchCandidates(output, options.sampler), sampler, folder, note)


def write_output_policies(output: OutputCandidates, sampler_name: str, tries: int, folder: Path, note: str) -> None:
    """Calibrated forecasts of the output; each skipped step saves a whole one."""
    for target in TARGETS:
        method = output.polished(output.method(max(2, int(output.steps / target)), sampler_name), tries)
        path = folder / f"best-{target:g}x.yaml"
        policies.save(method, path, comment=f"{target:g}x fewer FLOPs. {note}")
        print(path, flush=True)


def write_branch_policies(candidates: BranchCandidates, sampler, folder: Path, note: str) -> None:
    """Expert-branch forecasts with as many full steps as the speed-up allows; the variant with the closest images."""
    for target in TARGETS:
        found = [try_branches(candidates, variant, target, sampler) for variant in VARIANTS]
        reached = [pair for pair in found if pair is not None]
        if not reached:
            print(f"branch-{target:g}x: not reached", flush=True)
            continue
        path = folder / f"branch-{target:g}x.yaml"
        method = min(reached, key=lambda pair: pair[0])[1]
        policies.save(method, path, comment=f"{target:g}x fewer FLOPs. {note}")
        print(path, flush=True)


def try_branches(
    candidates: BranchCandidates, variant: BranchVariant, target: float, sampler
) -> tuple[float, policies.Method] | None:
    """Loss on the calibration images, and the method; None where even 2 full steps are too slow."""
    output = candidates.output
    full = int(output.steps / target)
    while full >= 2:
        method = candidates.method(full, variant)
        fast = output.plain.with_policy(method)
        images = sampler(fast)
        speedup = fast.stats().flops_speedup
        if speedup >= target * (1 - SLACK):
            return image_loss(images, output.recording.final), method
        full = fewer_full(output.steps, full, speedup, target)
    return None


if __name__ == "__main__":
    main()
