"""Times: whole trajectories of the original, the vectorised original and a few runs at a time, taking turns.

A round holds both originals and one group of runs, so that a speed-up compares neighbours in time, and every group
is finished, written down and forgotten before the next one is built.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from moeca_fx.bench.contestants import Contestant, build_contestant
from moeca_fx.bench.entries import Entry
from moeca_fx.bench.settings import BenchSettings
from moeca_fx.bench.subject import Subject
from moeca_fx.timing import median_speedup, time_interleaved

GROUP = 6
"""Runs that share a round's two originals."""


@dataclass(frozen=True)
class Latency:
    """Times of one run.

    Attributes:
        seconds: of a trajectory, one value a round.
        speedup, over_vectorised: median over the rounds of the original's time over this one's, and of the vectorised
            original's.
    """

    seconds: tuple[float, ...]
    speedup: float
    over_vectorised: float

    @property
    def median_seconds(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.seconds)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)


def groups_of(entries: Sequence[Entry]) -> Iterator[tuple[Entry, ...]]:
    """The runs in groups that are timed together."""
    for begin in range(0, len(entries), GROUP):
        yield tuple(entries[begin : begin + GROUP])


def time_group(
    group: Sequence[Entry],
    subject: Subject,
    settings: BenchSettings,
    on_step: Callable[[], None] | None = None,
) -> dict[str, Latency]:
    """Time these runs beside both originals.

    Returns:
        By `Entry.name`; ``original`` and ``vectorised`` are among them.

    Raises:
        MoecaError: a run did not repeat itself.
    """
    originals = (Entry("original", "original", "baseline"), Entry("vectorised", "vectorised", "baseline"))
    entries = [*originals, *(entry for entry in group if entry.group != "baseline")]
    noise, labels = (part[: settings.batch] for part in subject.start(settings))
    contestants = {entry.name: build_contestant(entry, subject, settings, timed=True) for entry in entries}

    def trajectory(contestant: Contestant) -> Any:
        return contestant.draw(noise, labels, settings.seed, None if on_step is None else lambda *_: on_step())

    for contestant in contestants.values():
        contestant.draw(noise[:1], labels[:1], settings.seed)  # every graph it needs, on the smallest batch
    runs = {name: partial(trajectory, contestant) for name, contestant in contestants.items()}
    seconds, _ = time_interleaved(runs, settings.repeats)
    return {
        name: Latency(
            seconds=times,
            speedup=median_speedup(seconds["original"], times),
            over_vectorised=median_speedup(seconds["vectorised"], times),
        )
        for name, times in seconds.items()
    }
