"""Trials of a search, written to a file as they finish, so that an interrupted search loses none."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moeca_fx.errors import ConfigError
from moeca_fx.policies import Method


@dataclass(frozen=True)
class Trial:
    """One method on the calibration batch: FLOPs speed-up, PSNR in dB, bytes of cache."""

    speedup: float
    psnr: float
    cache_bytes: int


class TrialLog:
    """Finished trials by method; with a file, one JSON line each.

    Args:
        path: the file; None keeps trials in memory.
        run: fingerprint of the calibration run; trials of other runs in the file are ignored.
    """

    def __init__(self, path: Path | None, run: str) -> None:
        self.path, self.run = path, run
        self._done: dict[str, Trial] = {}
        if path is not None and path.exists():
            for number, line in enumerate(_whole_lines(path), start=1):
                self._read(line, number)

    def _read(self, line: str, number: int) -> None:
        try:
            entry = json.loads(line)
            if entry["run"] == self.run:
                self._done[entry["method"]] = Trial(**entry["trial"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"trial log {self.path}, line {number}: expected a trial, found {line[:60]!r}; give another file"
            ) from error

    def get(self, method: Method) -> Trial | None:
        """The finished trial of this method, if any."""
        return self._done.get(_key(method))

    def add(self, method: Method, trial: Trial) -> None:
        """Remember a trial, on disk first."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            entry: dict[str, Any] = {"run": self.run, "method": _key(method), "trial": asdict(trial)}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        self._done[_key(method)] = trial


def _whole_lines(path: Path) -> list[str]:
    """Lines of the file; a last one that an interruption cut off is removed from it."""
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        os.truncate(path, len(whole.encode()))
    return whole.splitlines()


def _key(method: Method) -> str:
    return json.dumps({"policy": method.method, **method.as_dict()}, sort_keys=True)
