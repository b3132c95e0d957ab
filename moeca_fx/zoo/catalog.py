"""The zoo by name: which models there are, how to build one, and inputs that fit it."""

from difflib import get_close_matches
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from moeca_fx.errors import InputError, TargetError, WeightsError
from moeca_fx.zoo.digits import config as digits
from moeca_fx.zoo.dit_moe import DIT_MOE_CONFIGS, DiTMoE, DiTMoEConfig
from moeca_fx.zoo.dsmoe import DSMOE_CONFIGS, DSMoE, DSMoEConfig
from moeca_fx.zoo.glyphs import config as glyphs
from moeca_fx.zoo.initialize import randomize_

CONFIGS: dict[str, DSMoEConfig | DiTMoEConfig] = {
    **DSMOE_CONFIGS,
    **DIT_MOE_CONFIGS,
    "digits": digits.DIGITS,
    "glyphs": glyphs.GLYPHS,
}
TRAINED: dict[str, Path] = {"digits": digits.WEIGHTS, "glyphs": glyphs.WEIGHTS}
"""Where the trained weights live; they are used when none are given."""

DDPM_STEPS = 1000


def names() -> tuple[str, ...]:
    """Every name that `build` knows."""
    return tuple(CONFIGS)


def config_of(name: str) -> DSMoEConfig | DiTMoEConfig:
    """The configuration behind a name.

    Raises:
        TargetError: there is no such model; the message lists the nearest names.
    """
    if name in CONFIGS:
        return CONFIGS[name]
    near = get_close_matches(name.lower(), names(), n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known models: {', '.join(names())}"
    raise TargetError(f"no zoo model is called {name!r}; {hint}")


def build(name: str, *, weights: str | PathLike[str] | None = None, seed: int = 0) -> nn.Module:
    """Build a model in eval mode.

    Args:
        name: one of `names()`.
        weights: a local file or a hub id, see `moeca_fx.zoo.load_weights`. Without it, ``digits`` and
            ``glyphs`` get their trained weights; every other model gets seeded random weights. Unlike a published
            start of training, those do *not* zero the adaLN gates and the final layer, so that attention and
            experts reach the output.
        seed: of the random weights.

    Raises:
        TargetError: unknown name.
        WeightsError: the weights are missing, corrupt or do not fit.
    """
    config = config_of(name)
    model: nn.Module = DSMoE(config) if isinstance(config, DSMoEConfig) else DiTMoE(config)
    if weights is None and name in TRAINED:
        weights = _trained(name)
    if weights is None:
        randomize_(model, seed)
    else:
        from moeca_fx.zoo.loading import load_weights

        load_weights(model, weights)
    return model.eval()


def _trained(name: str) -> Path:
    path = TRAINED[name]
    if not path.is_file():
        raise WeightsError(
            f"the trained weights of {name!r} are expected at {path}, and no file is there; clone the repository "
            "(an installed wheel may leave them out), or train them with "
            f"`python -m moeca_fx.zoo.training.train --model {name} --out DIR` and pass weights=DIR/{path.name}"
        )
    return path


def example_inputs(model: nn.Module | str, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Seeded inputs for a zoo model, on the CPU in fp32.

    Args:
        model: a `DSMoE`, a `DiTMoE`, or a name.
        batch: B.
        seed: of a private generator.

    Returns:
        x [B, C, S, S] standard normal; t [B]: in [0, 1) for DSMoE, whole steps in [0, 1000) for DiT-MoE; y
        [B] int64.
    """
    if batch < 1:
        raise InputError(f"example_inputs: batch must be at least 1, got {batch}")
    config = config_of(model) if isinstance(model, str) else getattr(model, "config", None)
    if not isinstance(config, DSMoEConfig | DiTMoEConfig):
        raise InputError(f"example_inputs knows zoo models only, got {type(model).__name__}")
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, config.in_channels, config.input_size, config.input_size, generator=generator)
    t = torch.rand(batch, generator=generator)
    if isinstance(config, DiTMoEConfig):
        t = (t * DDPM_STEPS).floor()
    y = torch.randint(config.num_classes, (batch,), generator=generator)
    return x, t, y
