"""The judge: a support-vector classifier of real digits, fit when first used (about 0.1 s, deterministic)."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from moeca_fx.errors import InputError, require
from moeca_fx.zoo.digits.data import load_split


@dataclass(frozen=True)
class DigitClassifier:
    """A fitted classifier.

    Attributes:
        machine: the scikit-learn estimator.
        held_out_accuracy: share of the held-out real digits it recognises.
    """

    machine: Any
    held_out_accuracy: float

    def predict(self, images: Tensor) -> Tensor:
        """Labels [N] int64 of images [N, 1, 8, 8] in [-1, 1]; values outside are clamped first."""
        return torch.from_numpy(self.machine.predict(_features(images))).long()


def _features(images: Tensor) -> Any:
    if images.dim() != 4 or images.shape[1:] != (1, 8, 8):
        raise InputError(f"the digit classifier expects images [N, 1, 8, 8], got {tuple(images.shape)}")
    return images.detach().float().clamp(-1, 1).flatten(1).cpu().numpy()


@lru_cache(maxsize=1)
def load_classifier() -> DigitClassifier:
    """Fit on the learning split and score on the held-out one.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    require("sklearn.svm", "demo")
    from sklearn.svm import SVC

    (images, labels), (held_images, held_labels) = load_split()
    machine = SVC(C=10.0, gamma="scale").fit(_features(images), labels.numpy())
    score = float(machine.score(_features(held_images), held_labels.numpy()))
    return DigitClassifier(machine, score)


def accuracy(images: Tensor, labels: Tensor) -> float:
    """Share of `images` [N, 1, 8, 8] that the classifier recognises as `labels` [N]."""
    right = load_classifier().predict(images) == labels.cpu()
    return int(right.sum()) / len(labels)
