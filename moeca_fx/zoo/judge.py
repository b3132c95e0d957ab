"""The judge of a task: a small convolutional classifier of its real images, for class shares and for features.

Its features stand in for Inception's in the Fréchet distance and the score of `moeca_fx.distribution`: numbers of
images this small mean nothing to a network of photographs.
"""

from functools import lru_cache

import torch
from torch import Tensor, nn

from moeca_fx.errors import InputError, WeightsError
from moeca_fx.zoo.loading import load_weights
from moeca_fx.zoo.training.task import find_task

FEATURES = 64
CHUNK = 500
SMALLEST_SIDE = 4


class Judge(nn.Module):
    """Convolutions that halve the side down to 4, a layer of 64 features, one of class logits.

    Args:
        side: S of the images, a power of two of at least 8.
        num_classes: K.
    """

    def __init__(self, side: int, num_classes: int) -> None:
        super().__init__()
        self.side = side
        width, layers = 16, [_convolution(1, 16, stride=1)]
        while side > SMALLEST_SIDE:
            wider = min(2 * width, FEATURES)
            layers.append(_convolution(width, wider, stride=2))
            width, side = wider, side // 2
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * side**2, FEATURES), nn.SiLU())
        self.head = nn.Linear(FEATURES, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, K] of images [N, 1, S, S] in [-1, 1]."""
        logits: Tensor = self.head(self.body(images))
        return logits

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Penultimate features [N, 64] of images [N, 1, S, S]; values outside [-1, 1] are clamped first.

        Raises:
            InputError: the images have another shape.
        """
        if images.dim() != 4 or images.shape[1:] != (1, self.side, self.side):
            raise InputError(f"the judge expects images [N, 1, {self.side}, {self.side}], got {list(images.shape)}")
        chunks = torch.split(images.detach().float().clamp(-1, 1), CHUNK)
        return torch.cat([self.body(chunk) for chunk in chunks])

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """Class probabilities [N, K]; images and errors as in `features`."""
        logits: Tensor = self.head(self.features(images))
        return logits.softmax(dim=1)

    def predict(self, images: Tensor) -> Tensor:
        """The likeliest class [N] int64; images and errors as in `features`."""
        return self.probabilities(images).argmax(dim=1)


def _convolution(channels: int, width: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, width, 3, stride, padding=1), nn.GroupNorm(4, width), nn.SiLU())


def build_judge(name: str) -> Judge:
    """An untrained judge of the images of a trained model (`digits`, `glyphs`), from the global generator.

    Raises:
        TargetError: there is no such trained model.
    """
    config = find_task(name).config
    return Judge(config.input_size, config.num_classes)


@lru_cache(maxsize=2)
def load_judge(name: str) -> Judge:
    """The trained judge, in eval mode; one object for all callers.

    Raises:
        TargetError: there is no such trained model.
        WeightsError: its weights are missing or do not fit.
    """
    judge, path = build_judge(name), find_task(name).judge
    if not path.is_file():
        raise WeightsError(
            f"the judge of {name!r} is expected at {path}, and no file is there; reinstall the package, or train it "
            f"with `python -m moeca_fx.zoo.training.judge --model {name} --out {path}`"
        )
    load_weights(judge, path)
    return judge.eval().requires_grad_(False)


def merge_look_alikes(labels: Tensor, groups: tuple[tuple[int, ...], ...]) -> Tensor:
    """Labels [N] with every class replaced by the first of its group, so that look-alikes compare equal."""
    merged = labels.clone()
    for first, *others in groups:
        for other in others:
            merged[labels == other] = first
    return merged
