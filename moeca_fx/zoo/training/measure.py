"""Measure a trained model: ``python -m moeca_fx.zoo.training.measure --model NAME [--samples --steps --seed]``.

Draws class-conditional samples, asks a classifier of real images, and reports the share it recognises, per class
too, the distance to the nearest training image (near zero for a model that only copies its data), and the Fréchet
distance and score of the judge's features; each beside the same number of real images the model has not seen.
"""

import argparse
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from moeca_fx.distribution import FRECHET_LABEL, SCORE_LABEL
from moeca_fx.errors import InputError, require
from moeca_fx.zoo.catalog import build
from moeca_fx.zoo.judge import FEATURES
from moeca_fx.zoo.sampling import SAMPLERS, guided, noise_and_labels, sample
from moeca_fx.zoo.training.portrait import CLASSIFIERS, Classifier, Portrait, find_classifier, portray
from moeca_fx.zoo.training.task import TASKS, Task, find_task

log = logging.getLogger(__name__)

CHUNK = 100


@dataclass(frozen=True)
class Draw:
    """What to draw: `samples` images in `steps` steps of `sampler`, guided or not; noise of `seed`, classes in turn."""

    samples: int = 1000
    steps: int = 100
    seed: int = 7
    sampler: str = "euler"
    guidance: float = 1.0

    def __post_init__(self) -> None:
        if self.samples <= FEATURES or self.steps < 1:
            raise InputError(
                f"measure: expected more than {FEATURES} samples (the judge's features) and at least 1 step, "
                f"found {self.samples} and {self.steps}"
            )


def draw(
    task: Task, model: nn.Module, wanted: Draw, progress: Callable[[], None] = lambda: None
) -> tuple[Tensor, Tensor]:
    """Images [N, C, S, S] clamped to [-1, 1] and their labels [N].

    Args:
        task: what the model learnt.
        model: it, or a transformed one.
        wanted: what to draw, in chunks of at most 100.
        progress: called after every step of every chunk.
    """
    noise, labels = noise_and_labels(wanted.samples, wanted.seed, task.config)
    parts = zip(torch.split(noise, CHUNK), torch.split(labels, CHUNK), strict=True)
    velocity = guided(model, wanted.guidance, task.config.num_classes)
    chunks = [
        sample(velocity, *part, wanted.steps, lambda *_: progress(), sampler=wanted.sampler, seed=wanted.seed + number)
        for number, part in enumerate(parts)
    ]
    return torch.cat(chunks).clamp(-1, 1), labels


def portray_held_out(task: Task, count: int, classifier: Classifier | None = None) -> Portrait:
    """`portray` for `count` held-out real images, or as many as there are, in a fixed random order."""
    images, labels = task.load_split()[1]
    pick = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]
    return portray(task, images[pick], labels[pick], classifier)


def report(samples: Portrait, real: Portrait) -> tuple[str, ...]:
    """Both portraits as lines of text, and each class's share of the samples."""
    rows = (
        ("recognised, %", 100 * samples.accuracy, 100 * real.accuracy),
        ("recognised, look-alikes merged, %", 100 * samples.merged_accuracy, 100 * real.merged_accuracy),
        ("median distance to nearest training image", samples.distance, real.distance),
        (f"{FRECHET_LABEL} to training images", samples.frechet, real.frechet),
        (SCORE_LABEL, samples.score, real.score),
    )
    return (
        f"{'':<44}{'samples':>8}{'real, held out':>16}",
        *(f"{name:<44}{ours:>8.2f}{theirs:>16.2f}" for name, ours, theirs in rows),
        "per class " + " ".join(f"{share:.2f}" for share in samples.per_class),
    )


def main() -> None:
    """Measure the trained weights or the file given by ``--weights``, with a progress bar."""
    require("rich.progress", "demo")
    from rich.progress import Progress

    defaults = Draw()
    parser = argparse.ArgumentParser(description="Measure a trained model of moeca_fx's zoo.")
    parser.add_argument("--model", choices=tuple(TASKS), required=True)
    parser.add_argument("--weights", type=Path, default=None, help="default: the trained weights")
    parser.add_argument("--samples", type=int, default=defaults.samples)
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--sampler", choices=tuple(SAMPLERS), default=defaults.sampler)
    parser.add_argument("--guidance", type=float, default=defaults.guidance, help="classifier-free; 1 is none")
    parser.add_argument("--classifier", choices=CLASSIFIERS, default="judge")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads for torch")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    task = find_task(arguments.model)
    classifier = find_classifier(task, arguments.classifier)
    wanted = Draw(arguments.samples, arguments.steps, arguments.seed, arguments.sampler, arguments.guidance)
    model = build(task.name, weights=arguments.weights)
    with Progress(transient=True) as bar:
        drawing = bar.add_task("drawing samples", total=wanted.steps * math.ceil(wanted.samples / CHUNK))
        images, labels = draw(task, model, wanted, lambda: bar.advance(drawing))
    samples = portray(task, images, labels, classifier)
    for line in report(samples, portray_held_out(task, wanted.samples, classifier)):
        log.info("%s", line)


if __name__ == "__main__":
    main()
