"""Run the suite: quality first, run by run, then times; what the store holds already is not done again."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from moeca_fx.bench.contestants import build_contestant
from moeca_fx.bench.entries import Entry
from moeca_fx.bench.latency import Latency, groups_of, time_group
from moeca_fx.bench.quality import Quality, draw_all, measure
from moeca_fx.bench.settings import BenchSettings
from moeca_fx.bench.store import Store
from moeca_fx.bench.subject import Subject
from moeca_fx.errors import MoecaError
from moeca_fx.progress import Observer, SilentObserver
from moeca_fx.timing import pinned_threads

ORIGINAL = Entry("original", "original", "baseline")

RECORDS = 2
"""Version of what is stored; records of another one are not found."""


@dataclass(frozen=True)
class Row:
    """One run of the suite and what was found.

    Attributes:
        quality: None when the run was refused.
        latency: None without timing.
        refused: why it could not run with this model.
    """

    entry: Entry
    quality: Quality | None = None
    latency: Latency | None = None
    refused: str = ""


class Bench:
    """One subject under one setting.

    Args:
        store: where finished runs are written and found.
        observer: told of stages, and of every step of runs that are not in the store.
    """

    def __init__(
        self, subject: Subject, settings: BenchSettings, store: Store, observer: Observer | None = None
    ) -> None:
        self.subject, self.settings, self.store = subject, settings, store
        self.watch = observer or SilentObserver()

    def run(self, entries: Sequence[Entry], latency: bool = True) -> list[Row]:
        """Quality of all entries, then times of those that ran.

        Raises:
            MoecaError: the file system refused, or a run did not repeat itself.
        """
        with pinned_threads(self.settings.threads):
            rows = [self._quality_row(entry) for entry in entries]
            if not latency:
                return rows
            ran = [row.entry for row in rows if row.quality is not None]
            times = self._latencies(ran)
        return [row if row.quality is None else Row(row.entry, row.quality, times[row.entry.name]) for row in rows]

    def steps_left(self, entries: Sequence[Entry], latency: bool = True) -> int:
        """Denoising steps that `run` will take, about; for a progress bar."""
        trajectories = self.settings.samples // self.settings.batch
        new = [entry for entry in entries if self.store.get(self._quality_key(entry)) is None]
        steps = trajectories * sum(self._steps(entry) for entry in [ORIGINAL, *new]) if new else 0
        if latency:
            untimed = [entry for entry in entries if self.store.get(self._latency_key(entry)) is None]
            groups = list(groups_of(untimed))
            timed = sum(self._steps(entry) for entry in untimed) + 2 * self.settings.steps * len(groups)
            steps += self.settings.repeats * timed
        return steps

    def quality(self, entry: Entry) -> Quality:
        """Of one entry, from the store or run now.

        Raises:
            MoecaError: it cannot run with this model.
        """
        key = self._quality_key(entry)
        found = self.store.get(key)
        if found is None:
            found = self._measured(entry).as_dict()
            self.store.add(key, found)
        return Quality(**found)

    @cached_property
    def reference(self) -> Tensor:
        """The original's images, drawn once a process."""
        self.watch.stage("original")
        contestant = build_contestant(ORIGINAL, self.subject, self.settings)
        return draw_all(contestant, self.subject, self.settings, self.watch.step)

    def _measured(self, entry: Entry) -> Quality:
        reference = self.reference
        contestant = build_contestant(entry, self.subject, self.settings)
        self.watch.stage(entry.name)
        images = draw_all(contestant, self.subject, self.settings, self.watch.step)
        return measure(contestant, images, reference, self.subject, self.settings)

    def _quality_row(self, entry: Entry) -> Row:
        try:
            return Row(entry, self.quality(entry))
        except MoecaError as error:
            if entry.group == "baseline":
                raise
            return Row(entry, refused=str(error))

    def _latencies(self, entries: Sequence[Entry]) -> dict[str, Latency]:
        found = {entry.name: self.store.get(self._latency_key(entry)) for entry in entries}
        missing = [entry for entry in entries if found[entry.name] is None]
        for group in groups_of(missing):
            self.watch.stage(f"timing {', '.join(entry.name for entry in group)}")
            times = time_group(group, self.subject, self.settings, self.watch.step)
            for entry in group:
                found[entry.name] = times[entry.name].as_dict()
                self.store.add(self._latency_key(entry), found[entry.name])
        return {name: _latency(record) for name, record in found.items() if record is not None}

    def _steps(self, entry: Entry) -> int:
        steps: int = entry.fields.get("steps", self.settings.steps)
        return steps

    def _quality_key(self, entry: Entry) -> dict[str, Any]:
        return self._key("quality", entry, self.settings.quality_key())

    def _latency_key(self, entry: Entry) -> dict[str, Any]:
        return self._key("latency", entry, self.settings.latency_key())

    def _key(self, what: str, entry: Entry, settings: dict[str, Any]) -> dict[str, Any]:
        subject = {"target": self.subject.name, "weights": self.subject.fingerprint}
        return {"what": what, "records": RECORDS, **subject, **settings, **entry.key()}


def _latency(record: dict[str, Any]) -> Latency:
    return Latency(**record | {"seconds": tuple(record["seconds"])})
