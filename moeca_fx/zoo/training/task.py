"""The trained models of the zoo: size, weights file, data."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from moeca_fx.errors import TargetError
from moeca_fx.zoo.digits import config as digits
from moeca_fx.zoo.digits import data as digits_data
from moeca_fx.zoo.dsmoe_config import DSMoEConfig
from moeca_fx.zoo.glyphs import config as glyphs
from moeca_fx.zoo.glyphs import data as glyphs_data

Split = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Task:
    """One data set and the model that learns to draw it.

    Attributes:
        name: the zoo's name of the model.
        config: its size.
        weights: where the trained weights live.
        load_split: (images, labels) to learn from and held out; images [N, C, S, S] in [-1, 1].
        grey_step: distance of two grey levels in [-1, 1]; training adds uniform noise of half of it.
    """

    name: str
    config: DSMoEConfig
    weights: Path
    load_split: Callable[[], Split]
    grey_step: float


TASKS = {
    "digits": Task("digits", digits.DIGITS, digits.WEIGHTS, digits_data.load_split, 2 / digits_data.PIXEL_MAX),
    "glyphs": Task("glyphs", glyphs.GLYPHS, glyphs.WEIGHTS, glyphs_data.load_split, 2 / (glyphs_data.GREY_LEVELS - 1)),
}


def find_task(name: str) -> Task:
    """The task behind a trained model's name.

    Raises:
        TargetError: there is no such trained model.
    """
    if name not in TASKS:
        raise TargetError(f"{name!r} is no trained model of the zoo; trained models: {', '.join(TASKS)}")
    return TASKS[name]
