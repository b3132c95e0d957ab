"""Measure the digits model: ``python -m moeca_fx.zoo.training.measure [--samples 1000 --steps 100 --seed 7]``.

Draws class-conditional samples, asks the classifier of real digits, and reports the share it recognises, per
class too, with the distance to the nearest training image (near zero for a model that only copies its data).
"""

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from moeca_fx.zoo.catalog import build
from moeca_fx.zoo.digits.classifier import load_classifier
from moeca_fx.zoo.digits.config import CLASSES
from moeca_fx.zoo.digits.data import load_split
from moeca_fx.zoo.sampling import noise_and_labels, sample

log = logging.getLogger(__name__)

CHUNK = 100


@dataclass(frozen=True)
class Quality:
    """What was measured.

    Attributes:
        accuracy: share of samples recognised as their class.
        per_class: the same for each class.
        sample_distance: median L2 distance of a sample to the nearest training image (64 pixels in [-1, 1]).
        real_distance: the same for held-out real digits, for comparison.
        held_out_accuracy: the classifier's share on held-out real digits.
    """

    accuracy: float
    per_class: tuple[float, ...]
    sample_distance: float
    real_distance: float
    held_out_accuracy: float


def _nearest(images: Tensor, reference: Tensor) -> float:
    return float(torch.cdist(images.flatten(1), reference.flatten(1)).amin(dim=1).median())


def measure(model: nn.Module, samples: int, steps: int, seed: int) -> Quality:
    """Sample `samples` images in `steps` Euler steps from noise of `seed` and judge them."""
    noise, labels = noise_and_labels(samples, seed)
    parts = zip(torch.split(noise, CHUNK), torch.split(labels, CHUNK), strict=True)
    images = torch.cat([sample(model, *part, steps=steps) for part in parts]).clamp(-1, 1)
    classifier = load_classifier()
    right = classifier.predict(images) == labels
    (train_images, _), (held_images, _) = load_split()
    return Quality(
        accuracy=int(right.sum()) / samples,
        per_class=tuple(float(right[labels == c].float().mean()) for c in range(CLASSES)),
        sample_distance=_nearest(images, train_images),
        real_distance=_nearest(held_images, train_images),
        held_out_accuracy=classifier.held_out_accuracy,
    )


def main() -> None:
    """Measure the shipped weights or the file given by ``--weights``."""
    parser = argparse.ArgumentParser(description="Measure the digits model of moeca_fx.")
    parser.add_argument("--weights", type=Path, default=None, help="default: the shipped weights")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--threads", type=int, default=None, help="CPU threads for torch")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    model = build("digits", weights=arguments.weights)
    quality = measure(model, arguments.samples, arguments.steps, arguments.seed)
    log.info("recognised %.2f %% of %d samples", 100 * quality.accuracy, arguments.samples)
    log.info("per class %s", " ".join(f"{share:.3f}" for share in quality.per_class))
    log.info("classifier on held-out real digits %.2f %%", 100 * quality.held_out_accuracy)
    log.info(
        "median distance to the nearest training image: samples %.2f, held-out digits %.2f",
        quality.sample_distance,
        quality.real_distance,
    )


if __name__ == "__main__":
    main()
