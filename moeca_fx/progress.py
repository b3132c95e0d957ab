"""How long work is followed without the library printing: it tells an observer, the command draws a bar."""

from typing import Protocol


class Observer(Protocol):
    """Told what a long run does; every run works without one."""

    def stage(self, text: str) -> None:
        """A new stage begins."""

    def step(self) -> None:
        """One denoising step of the counted ones is done."""


class SilentObserver:
    """Ignores everything."""

    def stage(self, text: str) -> None:
        """Ignore it."""

    def step(self) -> None:
        """Ignore it."""
