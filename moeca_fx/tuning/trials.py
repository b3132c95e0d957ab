"""Trials of a search, written to a file as they finish, so that an interrupted search loses none."""

import json
import os
from collections import UserDict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from moeca_fx.errors import ConfigError, MoecaError
from moeca_fx.policies import Method

BEGIN = '{"run": '
"""How every line begins, a cut one too."""


@dataclass(frozen=True)
class Trial:
    """One method on the calibration batch: FLOPs speed-up, PSNR in dB, bytes of cache."""

    speedup: float
    psnr: float
    cache_bytes: int


class TrialLog:
    """Finished trials by method, and losses of schedules by their full steps; with a file, one JSON line each.

    Args:
        path: the file; None keeps everything in memory.
        run: fingerprint of the calibration run; lines of other runs in the file are ignored.

    Raises:
        ConfigError: the file holds something else than trials; it is left as it is.
        MoecaError: the file cannot be read.
    """

    def __init__(self, path: Path | None, run: str) -> None:
        self.path, self.run = path, run
        self._done: dict[str, Trial] = {}
        self._losses: dict[float, _Losses] = {}
        for entry in _entries(path) if path is not None else ():
            if entry["run"] != run:
                continue
            if "trial" in entry:
                self._done[entry["method"]] = Trial(**entry["trial"])
            else:
                self.losses(entry["plain_share"]).data[tuple(entry["full"])] = entry["loss"]

    def get(self, method: Method) -> Trial | None:
        """The finished trial of this method, if any."""
        return self._done.get(_key(method))

    def losses(self, plain_share: float) -> "_Losses":
        """What is known of schedules fitted with this weight of the plain error; written down as it is set."""
        return self._losses.setdefault(plain_share, _Losses(self._write, plain_share))

    def add(self, method: Method, trial: Trial) -> None:
        """Remember a trial, on disk first.

        Raises:
            MoecaError: the file system refused.
        """
        self._write({"method": _key(method), "trial": asdict(trial)})
        self._done[_key(method)] = trial

    def _write(self, entry: dict[str, Any]) -> None:
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"run": self.run, **entry}) + "\n")
        except OSError as error:
            raise MoecaError(f"trial log {self.path}: cannot be written: {error.strerror or error}") from error


class _Losses(UserDict[tuple[int, ...], float]):
    def __init__(self, write: Callable[[dict[str, Any]], None], plain_share: float) -> None:
        super().__init__()
        self._write, self._plain_share = write, plain_share

    def __setitem__(self, full: tuple[int, ...], loss: float) -> None:
        self._write({"full": list(full), "plain_share": self._plain_share, "loss": loss})
        self.data[full] = loss


def check_log(path: Path) -> None:
    """Refuse a file that is no log of trials before the search begins; what it holds stays as it is.

    Raises:
        ConfigError: it holds something else.
        MoecaError: it cannot be read.
    """
    _entries(path)


def _entries(path: Path) -> list[dict[str, Any]]:
    """Lines of the file, none if there is no file; a last one that an interruption cut off is removed from it."""
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise MoecaError(f"trial log {path}: cannot be read: {error}; give another file") from error
    whole, cut = text[: text.rfind("\n") + 1], text[text.rfind("\n") + 1 :]
    found = [_parse(path, number, line) for number, line in enumerate(whole.splitlines(), start=1)]
    if cut and not cut.startswith(BEGIN[: len(cut)]):
        _refuse(path, len(found) + 1, cut)
    if cut:
        os.truncate(path, len(whole.encode()))
    return found


def _parse(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
        complete = isinstance(entry["run"], str)
        if "trial" in entry:
            Trial(**entry["trial"])
            complete &= isinstance(entry["method"], str)
        else:
            tuple(entry["full"])
            complete &= isinstance(entry["loss"], float) and isinstance(entry["plain_share"], float)
    except (ValueError, KeyError, TypeError):
        complete = False
    if not complete:
        _refuse(path, number, line)
    return dict(entry)


def _refuse(path: Path, number: int, line: str) -> NoReturn:
    raise ConfigError(f"trial log {path}, line {number}: expected a trial, found {line[:60]!r}; give another file")


def _key(method: Method) -> str:
    return json.dumps({"policy": method.method, **method.as_dict()}, sort_keys=True)
