"""Outputs of every expert on a few rows and channels: enough to sort hypotheses out, little enough to try many.

128 experts of 2048 x 1344 take 4 GB: the products with the rows are kept for all activations and orders of halves, and
of the last matrix only the compared channels are read.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Outputs:
    """What experts give for J rows.

    Attributes:
        parts: [J, E, c] on the channels `spread(width, c)`.
        width: channels of a whole output.
    """

    parts: Tensor
    width: int


def spread(number: int, most: int) -> Tensor:
    """Some numbers below `number`, far apart: `most` of them, or all."""
    count = min(number, most)
    return torch.arange(count) * number // count
