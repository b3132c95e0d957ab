"""Stages of a diagnosis, timed: what was reached, what stopped, what was not reached."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from moeca_fx.diagnosis.report import Stage
from moeca_fx.errors import MoecaError
from moeca_fx.reasons import Reason


class Stopped(Exception):
    """A stage stopped; the stages have it."""


class Stages:
    """The stages so far.

    Args:
        names: of all stages, in order.

    Attributes:
        done: those that were reached, by name.
        error, code: of the one that stopped.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.done: dict[str, Stage] = {}
        self.error = ""
        self.code: Reason | None = None

    def add(self, name: str, seconds: float, note: str = "") -> None:
        """A stage that went through."""
        self.done[name] = Stage(name, "ok", seconds, note)

    def stop(self, name: str, seconds: float, error: Exception, note: str = "") -> None:
        """The stage that did not."""
        self.done[name] = Stage(name, "stopped", seconds, note)
        known = isinstance(error, MoecaError)
        self.error = str(error) if known else f"{type(error).__name__}: {error}"
        self.code = error.code if isinstance(error, MoecaError) else None

    @contextmanager
    def stage(self, name: str) -> Iterator[list[str]]:
        """Time a stage; what the block appends to the list is its note.

        Raises:
            Stopped: it stopped.
        """
        note: list[str] = []
        start = time.perf_counter()
        try:
            yield note
        except Exception as error:  # a diagnosis tells where it stopped, whatever stopped it
            self.stop(name, time.perf_counter() - start, error)
            raise Stopped from error
        self.add(name, time.perf_counter() - start, "; ".join(note))

    def all(self) -> tuple[Stage, ...]:
        """Every stage, in order."""
        return tuple(self.done.get(name, Stage(name, "not reached")) for name in self.names)
