"""Parameters that a published method fits to each model: TeaCache's polynomial."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from moeca_fx.bench.entries import Entry
from moeca_fx.bench.settings import BenchSettings
from moeca_fx.bench.subject import Subject
from moeca_fx.calibration import Model, fit_teacache, record
from moeca_fx.zoo.sampling import sample

FITTED = "fitted"
"""Stands in an entry's fields for a value that is found here."""

SAMPLES = 8
SEED = 0
"""Of the calibration's noise; it asks for the even classes, the bench for the odd ones."""


def fill_in(entry: Entry, subject: Subject, settings: BenchSettings) -> dict[str, Any]:
    """The fields of an entry with fitted values in the place of `FITTED`."""
    fields = dict(entry.fields)
    if fields.get("coefficients") == FITTED:
        fields["coefficients"] = _teacache(subject, settings.steps, settings.sampler)
    return fields


@lru_cache(maxsize=4)
def _teacache(subject: Subject, steps: int, sampler: str) -> tuple[float, ...]:
    shape = subject.example(1)[0].shape[1:]
    noise = torch.randn(SAMPLES, *shape, generator=torch.Generator().manual_seed(SEED))
    classes = torch.arange(0, subject.num_classes, 2)
    labels = classes[torch.arange(SAMPLES) % len(classes)]

    def run(model: Model) -> Tensor:
        velocity = subject.velocity(model)  # type: ignore[arg-type]  # a recorder is called like the model
        return sample(velocity, noise, labels, steps, sampler=sampler, seed=SEED)

    return fit_teacache(subject.model, record(run, subject.model))
