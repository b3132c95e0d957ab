"""A set of images as a classifier and the judge see it: class shares, distances to the training data, a score."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moeca_fx.distribution import frechet_distance, inception_score
from moeca_fx.errors import ConfigError
from moeca_fx.zoo.judge import load_judge, merge_look_alikes
from moeca_fx.zoo.training.task import Task

CHUNK = 100
CLASSIFIERS = ("judge", "svm")


class Classifier(Protocol):
    """Whatever tells classes from images."""

    def predict(self, images: Tensor) -> Tensor:
        """Labels [N] int64 of images [N, C, S, S] in [-1, 1]."""


@dataclass(frozen=True)
class Portrait:
    """What was found in a set of images.

    Attributes:
        per_class: share of the images of each class that are recognised as it, nan without images of it.
        accuracy: share of all images recognised as their class.
        merged_accuracy: the same with look-alikes merged.
        distance: median L2 distance of an image to the nearest training image, pixels in [-1, 1].
        frechet: Fréchet distance of the judge's features to those of the training images, of as many images as are
            held out at most: it depends on the number, and samples are to compare with held-out images.
        score: Inception-style score of the judge's probabilities.
    """

    per_class: tuple[float, ...]
    accuracy: float
    merged_accuracy: float
    distance: float
    frechet: float
    score: float


def portray(task: Task, images: Tensor, labels: Tensor, classifier: Classifier | None = None) -> Portrait:
    """Look at images [N, C, S, S] in [-1, 1] of the classes `labels` [N].

    Args:
        task: what the images should look like.
        images: more than 64 of them.
        labels: int64.
        classifier: recognises the classes; the task's judge by default. Features are always the judge's.

    Raises:
        InputError: the images have another shape, or are too few for their features.
    """
    judge, ((train_images, _), (held_images, _)) = load_judge(task.name), task.load_split()
    found = (judge if classifier is None else classifier).predict(images)
    right = (found == labels).float()
    merged = merge_look_alikes(found, task.look_alikes) == merge_look_alikes(labels, task.look_alikes)
    return Portrait(
        per_class=tuple(float(right[labels == c].mean()) for c in range(task.config.num_classes)),
        accuracy=float(right.mean()),
        merged_accuracy=float(merged.float().mean()),
        distance=_nearest(images, train_images),
        frechet=frechet_distance(judge.features(images[: len(held_images)]), judge.features(train_images)),
        score=inception_score(judge.probabilities(images)),
    )


def find_classifier(task: Task, name: str) -> Classifier:
    """``judge``, or ``svm``: scikit-learn's support-vector machine, for the digits alone.

    Raises:
        ConfigError: the task has no such classifier.
    """
    if name == "judge":
        return load_judge(task.name)
    if name == "svm" and task.name == "digits":
        from moeca_fx.zoo.digits.classifier import load_classifier

        return load_classifier()
    raise ConfigError(f"the {task.name} have no classifier {name!r}; judge knows every model, svm the digits alone")


def _nearest(images: Tensor, reference: Tensor) -> float:
    chunks = torch.split(images.flatten(1), CHUNK)
    return float(torch.cat([torch.cdist(chunk, reference.flatten(1)).amin(dim=1) for chunk in chunks]).median())
