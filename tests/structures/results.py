"""Every structure of the sample examined, in two processes; shares of what transforms, by axis value and by reason."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context

import torch

from tests.structures.examine import Outcome, examine
from tests.structures.sampling import sample
from tests.structures.structure import AXES, Structure

PROCESSES = 2
_EACH_PROCESS = 70  # traces leave memory behind: a process is replaced after so many


@dataclass(frozen=True)
class Share:
    """How many structures with one value of one axis transformed."""

    axis: str
    value: str
    transformed: int
    total: int


@dataclass(frozen=True)
class Results:
    """Outcomes of structures, by their index in the sample."""

    outcomes: tuple[tuple[int, Structure, Outcome], ...]

    @property
    def transformed(self) -> float:
        """Share that transforms and is proven equal."""
        return self.verdicts["transformed"] / len(self.outcomes)

    @property
    def verdicts(self) -> Counter[str]:
        """How often each verdict."""
        return Counter(outcome.verdict for _, _, outcome in self.outcomes)

    @property
    def reasons(self) -> Counter[str]:
        """How often each documented reason."""
        return Counter(outcome.reason for _, _, outcome in self.outcomes if outcome.verdict == "refused")

    @property
    def broken(self) -> list[str]:
        """A line for every broken promise, with the command that shows it."""
        return [
            f"python -m tests.structures.show {index}  # {outcome.reason}: {outcome.detail}"
            for index, _, outcome in self.outcomes
            if outcome.verdict == "failed"
        ]

    def by_value(self) -> Iterator[Share]:
        """The share of every value of every axis."""
        for axis, values in AXES.items():
            for value in values:
                verdicts = [o.verdict for _, s, o in self.outcomes if getattr(s, axis) == value]
                yield Share(axis, str(value), verdicts.count("transformed"), len(verdicts))

    def summary(self) -> str:
        """One line."""
        parts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(self.verdicts.items(), reverse=True))
        return (
            f"{len(self.outcomes)} structures: {parts}; {100 * self.transformed:.1f} % transform and are proven equal"
        )


def run(indices: Sequence[int] | None = None, processes: int = PROCESSES) -> Results:
    """Examine structures of the sample, all of them by default."""
    chosen = range(len(sample())) if indices is None else indices
    with get_context("spawn").Pool(processes, _steady, maxtasksperchild=_EACH_PROCESS) as pool:
        outcomes = pool.map(_examine, chosen, chunksize=1)
    return Results(tuple((index, sample()[index], outcome) for index, outcome in zip(chosen, outcomes, strict=True)))


def _steady() -> None:
    os.environ["MOECA_FX_COMPILE"] = "0"
    torch.set_num_threads(1)


def _examine(index: int) -> Outcome:
    return examine(sample()[index], seed=index)
