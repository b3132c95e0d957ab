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
        judge: where the weights of its `moeca_fx.zoo.judge.Judge` live.
        load_split: (images, labels) to learn from and held out; images [N, C, S, S] in [-1, 1].
        grey_step: distance of two grey levels in [-1, 1]; training adds uniform noise of half of it.
        look_alikes: groups of classes that a reader could not tell apart for certain.
    """

    name: str
    config: DSMoEConfig
    weights: Path
    judge: Path
    load_split: Callable[[], Split]
    grey_step: float
    look_alikes: tuple[tuple[int, ...], ...] = ()


DIGITS = Task(
    name="digits",
    config=digits.DIGITS,
    weights=digits.WEIGHTS,
    judge=digits.JUDGE,
    load_split=digits_data.load_split,
    grey_step=2 / digits_data.PIXEL_MAX,
)
GLYPHS = Task(
    name="glyphs",
    config=glyphs.GLYPHS,
    weights=glyphs.WEIGHTS,
    judge=glyphs.JUDGE,
    load_split=glyphs_data.load_split,
    grey_step=2 / (glyphs_data.GREY_LEVELS - 1),
    look_alikes=tuple(tuple(map(glyphs_data.CLASSES.index, group)) for group in glyphs_data.LOOK_ALIKES),
)
TASKS = {task.name: task for task in (DIGITS, GLYPHS)}


def find_task(name: str) -> Task:
    """The task behind a trained model's name.

    Raises:
        TargetError: there is no such trained model.
    """
    if name not in TASKS:
        raise TargetError(f"{name!r} is no trained model of the zoo; trained models: {', '.join(TASKS)}")
    return TASKS[name]
