"""Finished runs on disk, one JSON line each, so that a bench that was interrupted goes on where it stopped."""

import json
import os
from pathlib import Path
from typing import Any

from moeca_fx.errors import InputError, MoecaError
from moeca_fx.files import prepare_folder


class Store:
    """Records by key in a file to which lines are only ever added.

    Args:
        path: the file; created with the first record, its folder at once.

    Raises:
        MoecaError: the folder cannot be written.
        InputError: the file holds something else than records.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        prepare_folder(path.parent)
        self._records: dict[str, Any] = {}
        if path.exists():
            self._read()

    def get(self, key: dict[str, Any]) -> Any | None:
        """The record of a key, as `add` was given it; None when there is none."""
        return self._records.get(_canonical(key))

    def add(self, key: dict[str, Any], record: Any) -> None:
        """Write a finished run down before anything else happens.

        Raises:
            MoecaError: the file system refused.
        """
        line = json.dumps({"key": key, "record": record}, allow_nan=False) + "\n"
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise MoecaError(f"cannot write {self.path}: {error.strerror or error}; choose another folder") from error
        self._records[_canonical(key)] = record

    def _read(self) -> None:
        text = self.path.read_text(encoding="utf-8")
        whole, _, partial = text.rpartition("\n")
        if partial:  # the last line was being written when the run was interrupted
            os.truncate(self.path, len((whole + "\n").encode()) if whole else 0)
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                found = json.loads(line)
                self._records[_canonical(found["key"])] = found["record"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise InputError(
                    f"{self.path}, line {number}: expected a record of a bench run, found {line[:60]!r}; move the file "
                    "away or choose another folder"
                ) from error


def _canonical(key: dict[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)
