"""What is benched: a model, how it is sampled, and who judges its images."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

import moeca_fx
from moeca_fx.bench.settings import BenchSettings
from moeca_fx.provenance import fingerprint
from moeca_fx.runtime.flops import flop_counter
from moeca_fx.runtime.module import TransformedModel

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Subject:
    """The model of one bench run.

    Attributes:
        name: TARGET as it was given.
        model: as it is, with its weights.
        num_classes: classes it can be asked for.
        velocity: from the model, transformed or not, to `v(x, t, y)` with noise at t = 0, data at t = 1.
    """

    name: str
    model: nn.Module
    num_classes: int
    velocity: Callable[[nn.Module], Velocity]

    @cached_property
    def vectorised(self) -> TransformedModel:
        """The model with vectorised experts and no cache; what runs with fewer steps gets it too."""
        return moeca_fx.transform(self.model, self.example(2), policy=None, compile=False)

    def transformed(self, policy: Any) -> TransformedModel:
        """The model under a policy."""
        return self.vectorised.with_policy(policy)

    @cached_property
    def fingerprint(self) -> str:
        """Names the weights, so that records of other weights are not taken for these."""
        return fingerprint(*chain.from_iterable(self.model.state_dict().items()))

    def example(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs of one call."""
        return moeca_fx.zoo.example_inputs(self.model, batch=batch)

    def start(self, settings: BenchSettings) -> tuple[Tensor, Tensor]:
        """Noise [samples, C, S, S] and labels [samples] of the held-out classes, those with an odd number.

        Calibration and tuning use the even ones.
        """
        x, *_ = self.example(1)
        generator = torch.Generator().manual_seed(settings.seed)
        noise = torch.randn(settings.samples, *x.shape[1:], generator=generator)
        classes = torch.arange(1, self.num_classes, 2)
        return noise, classes[torch.arange(settings.samples) % len(classes)]

    def flops_per_step(self, batch: int) -> int:
        """FLOPs of one uncached call, 2 a multiply-add, counted while the original runs."""
        with torch.no_grad(), flop_counter() as counter:
            self.model(*self.example(batch))
        total: int = counter.get_total_flops()
        return total
