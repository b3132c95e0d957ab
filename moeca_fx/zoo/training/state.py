"""What a training run must save to continue bit for bit: weights, average, optimiser, random state, step."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from moeca_fx.errors import ConfigError, WeightsError
from moeca_fx.zoo.dsmoe import DSMoE

TIMESTEPS = ("uniform", "logit-normal")


@dataclass(frozen=True)
class TrainOptions:
    """Options that shape the result of a run.

    Attributes:
        steps: optimiser steps; also the length of the cosine schedule.
        batch: images per step.
        seed: of weights, batches, noise and timesteps.
        learning_rate: peak of the schedule.
        warmup: steps of linear warm-up.
        ema_decay: decay of the averaged weights, reached gradually.
        balance_rate: nudge of the router's correction bias per step.
        timesteps: how t is drawn, one of `TIMESTEPS`.
    """

    steps: int = 5000
    batch: int = 64
    seed: int = 0
    learning_rate: float = 1e-3
    warmup: int = 200
    ema_decay: float = 0.999
    balance_rate: float = 1e-3
    timesteps: str = "uniform"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or self.warmup < 0:
            raise ConfigError("TrainOptions: steps and batch must be at least 1 and warmup at least 0")
        if self.learning_rate <= 0 or self.balance_rate < 0 or not 0 <= self.ema_decay < 1:
            raise ConfigError("TrainOptions: learning_rate must be positive, balance_rate >= 0 and ema_decay in [0, 1)")
        if self.timesteps not in TIMESTEPS:
            raise ConfigError(
                f"TrainOptions.timesteps: expected one of {TIMESTEPS}, found {self.timesteps!r}; pass one"
            )


@dataclass
class TrainState:
    """A run in progress; `average` holds the exponential moving average of every state-dict entry."""

    model: DSMoE
    optimizer: torch.optim.Optimizer
    average: dict[str, Tensor]
    step: int = 0

    @torch.no_grad()
    def update_average(self, decay: float) -> None:
        """Move the average towards the model; early steps use a shorter memory."""
        decay = min(decay, (1 + self.step) / (10 + self.step))
        for name, value in self.model.state_dict().items():
            self.average[name].lerp_(value, 1 - decay)

    def save(self, path: Path, options: TrainOptions) -> None:
        """Write a checkpoint; a crash while writing leaves the previous one intact."""
        partial = path.with_suffix(".partial")
        torch.save(
            {
                "options": asdict(options),
                "step": self.step,
                "model": self.model.state_dict(),
                "ema": self.average,
                "optimizer": self.optimizer.state_dict(),
                "rng": torch.get_rng_state(),
            },
            partial,
        )
        os.replace(partial, path)

    def restore(self, path: Path, options: TrainOptions) -> None:
        """Continue from a checkpoint of the same options, global random state included.

        Only `options.steps` may differ: it re-plans the rest of the cosine schedule.

        Raises:
            WeightsError: the file is missing or unreadable.
            ConfigError: it was written with other options.
        """
        try:
            saved = torch.load(path, weights_only=True)
        except Exception as error:
            raise WeightsError(f"cannot resume: {path} is no readable checkpoint ({error})") from error
        if {**saved["options"], "steps": options.steps} != asdict(options):
            raise ConfigError(
                f"cannot resume {path}: it was written with {saved['options']}, "
                f"this run asks for {asdict(options)}; repeat the same options or start in another folder"
            )
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.average = saved["ema"]
        self.step = saved["step"]
        torch.set_rng_state(saved["rng"])
