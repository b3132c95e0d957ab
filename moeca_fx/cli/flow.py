"""Which zoo models can be sampled, and the way their time runs.

DSMoE is trained with noise at t = 0 and data at t = 1 (arXiv 2512.01252). The rectified-flow checkpoints of
DiT-MoE (XL and G, arXiv 2407.11633) run the other way, with the velocity pointing at the noise; its S and B
are trained as DDPM, for which this command has no sampler.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from moeca_fx import zoo
from moeca_fx.errors import TargetError
from moeca_fx.zoo.sampling import velocity_of

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Flow:
    """How a zoo model is sampled.

    Attributes:
        num_classes: classes it can be asked for, 0 to one less.
        null_class: label of the unconditional class, for guidance; None without one.
        backwards: whether its time runs from data to noise, and its velocity with it.
    """

    num_classes: int
    null_class: int | None
    backwards: bool = False

    def velocity(self, model: Callable[..., Any]) -> Velocity:
        """From the model (transformed, exported or neither) to `v(x, t, y)`, [B, C, S, S].

        For it t = 0 is noise, t = 1 is data and the velocity points at the data.
        """
        if self.backwards:
            return lambda x, t, y: -velocity_of(model(x, 1 - t, y), x)
        return lambda x, t, y: velocity_of(model(x, t, y), x)


def flow_of(text: str, model: nn.Module) -> Flow:
    """The flow of a zoo model.

    Args:
        text: TARGET, for the error.
        model: the untransformed model.

    Raises:
        TargetError: the model is not one that rectified flow trained.
    """
    found = find_flow(model)
    if found is not None:
        return found
    raise TargetError(
        f"TARGET {text!r}: sample knows the rectified-flow models of the zoo "
        "(digits, glyphs, dsmoe-*, dit-moe-xl, dit-moe-g); "
        "for another sampler call moeca_fx.transform in your own loop"
    )


def find_flow(model: nn.Module) -> Flow | None:
    """The flow of a zoo model; None for one that rectified flow did not train."""
    if isinstance(model, zoo.DSMoE):
        return Flow(model.config.num_classes, _null_class(model))
    if isinstance(model, zoo.DiTMoE) and model.config.packed_attention:  # XL and G
        return Flow(model.config.num_classes, _null_class(model), backwards=True)
    return None


def _null_class(model: zoo.DSMoE | zoo.DiTMoE) -> int | None:
    return model.config.num_classes if model.config.class_dropout > 0 else None
