"""The 1797 digits of scikit-learn as tensors, split once into a part to learn from and a held-out part."""

from functools import lru_cache

import torch
from torch import Tensor

from moeca_fx.errors import require

HELD_OUT = 360
SPLIT_SEED = 20240917
PIXEL_MAX = 16.0


@lru_cache(maxsize=1)
def _all_digits() -> tuple[Tensor, Tensor]:
    require("sklearn.datasets", "demo")
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / (PIXEL_MAX / 2) - 1
    return images, torch.tensor(bunch.target, dtype=torch.int64)


def load_split() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The real digits.

    Returns:
        (images, labels) to learn from and (images, labels) held out, images [N, 1, 8, 8] in [-1, 1], labels
        [N] int64. The generator and the classifier learn from the first part only.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    images, labels = _all_digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SPLIT_SEED))
    held, rest = order[:HELD_OUT], order[HELD_OUT:]
    return (images[rest], labels[rest]), (images[held], labels[held])
