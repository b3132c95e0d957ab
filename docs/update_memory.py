"""Measure what storing caches in fewer bits costs in quality, and rewrite the table of memory.md.

Samples a zoo model with MoECa and with its two shipped policies at every cache dtype, on classes that no policy was
tuned on (those with odd numbers) and a noise seed used for nothing else, and compares with the uncached original.

Usage: python docs/update_memory.py [TARGET] [--samples 32] [--steps 50] [--seed 640113]
"""

import argparse
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

import moeca_fx
from moeca_fx.evaluate import psnr, psnr_per_image
from moeca_fx.graph.storage import CacheDtype
from moeca_fx.zoo.sampling import sample, velocity_of

DOCS = Path(__file__).resolve().parent
PAGE, ZOO = DOCS / "memory.md", DOCS.parent / "moeca_fx" / "zoo"
BEGIN, END = "<!-- quality:begin -->\n", "<!-- quality:end -->\n"
POLICIES = ("moeca", "best-4x.yaml", "branch-4x.yaml")
DTYPES: tuple[CacheDtype | None, ...] = (None, "bf16", "fp8")
HEADINGS = ("policy", "`cache_dtype`", "PSNR dB", "worst image dB", "cache MiB", "of the model's dtype")


def rows(target: str, samples: int, steps: int, seed: int) -> list[tuple[str, ...]]:
    """One row a policy and cache dtype."""
    model = moeca_fx.zoo.build(target)
    inputs = moeca_fx.zoo.example_inputs(model, batch=2)
    classes = torch.arange(1, model.config.num_classes, 2)
    labels = classes[torch.arange(samples) % len(classes)]
    noise = torch.randn(samples, *inputs[0].shape[1:], generator=torch.Generator().manual_seed(seed))

    def draw(each: torch.nn.Module) -> Tensor:
        return sample(lambda x, t, y: velocity_of(each(x, t, y), x), noise, labels, steps)

    reference, found = draw(model), []
    plain = {dtype: moeca_fx.transform(model, inputs, policy=None, cache_dtype=dtype) for dtype in DTYPES}
    for policy in POLICIES:
        chosen = ZOO / target / policy if policy.endswith(".yaml") else policy
        largest = 0
        for dtype in DTYPES:
            fast = plain[dtype].with_policy(chosen)
            images, held = draw(fast), fast.memory().total
            largest = largest or held
            worst = float(psnr_per_image(images, reference).min())
            quality = (f"{psnr(images, reference):.2f}", f"{worst:.2f}", f"{held / 2**20:.2f}", f"{held / largest:.0%}")
            found.append((f"`{policy}`", "None" if dtype is None else f'`"{dtype}"`', *quality))
            print(*found[-1])
    return found


def section(options: argparse.Namespace) -> str:
    """The text between the markers."""
    command = f"python docs/update_memory.py {options.target} --samples {options.samples} --steps {options.steps}"
    lines = [
        f"`{command} --seed {options.seed}`,",
        f"{date.today().isoformat()}, torch {torch.__version__.partition('+')[0]}, a CPU, fp32 model, Euler, classes "
        "with odd numbers. PSNR against the",
        "uncached original.",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|---|---" + "|---:" * (len(HEADINGS) - 2) + "|",
        *("| " + " | ".join(row) + " |" for row in rows(options.target, options.samples, options.steps, options.seed)),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Rewrite the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", default="digits", help="a zoo model that was trained")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=640_113, help="of the noise; the default was used for nothing else")
    text = section(parser.parse_args())
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + text + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
