"""The entries of this process: one call each, or one file each.

moeca_fx.register(entry)            a call          moeca_fx.registry.load("scaled.py")     a file that defines ENTRY
"""

import importlib.util
from os import PathLike
from pathlib import Path

from torch import nn

from moeca_fx.errors import ConfigError
from moeca_fx.reasons import Reason
from moeca_fx.registry.entry import Entry

_entries: dict[str, Entry] = {}


def register(entry: Entry) -> Entry:
    """Let discovery use an entry, in this process, for models that are transformed from now on.

    Args:
        entry: what its modules compute.

    Returns:
        The entry.

    Raises:
        ConfigError: it is no entry, or another one has its name.
    """
    if not isinstance(entry, Entry):
        raise ConfigError(f"register: expected a moeca_fx.registry.Entry, found {type(entry).__name__}; make one")
    if _entries.get(entry.name, entry) != entry:
        raise ConfigError(
            f"register: another entry is called {entry.name!r}; expected a name of its own: rename this one, or "
            "unregister that one first"
        )
    _entries[entry.name] = entry
    return entry


def unregister(entry: Entry | str) -> None:
    """Forget an entry; models that were transformed with it keep it.

    Args:
        entry: it, or its name.

    Raises:
        ConfigError: none is registered by that name.
    """
    name = entry if isinstance(entry, str) else entry.name
    if name not in _entries:
        known = ", ".join(_entries) or "none"
        raise ConfigError(f"unregister: expected the name of a registered entry, found {name!r}; registered: {known}")
    del _entries[name]


def registered() -> tuple[Entry, ...]:
    """All entries, in the order in which they were registered."""
    return tuple(_entries.values())


def load(path: str | PathLike[str]) -> Entry:
    """Register the entry of a Python file, which defines it as ``ENTRY``.

    Args:
        path: of the file.

    Raises:
        ConfigError: there is no such file, it cannot be run, or it defines no entry.
    """
    file = Path(path)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if not file.is_file() or spec is None or spec.loader is None:
        raise ConfigError(f"entry file {str(path)!r}: expected a Python file, found none; check the path")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the file is the user's code, which may raise anything
        raise ConfigError(
            f"entry file {str(path)!r}: running it failed with {type(error).__name__}: {error}"
        ) from error
    entry = getattr(module, "ENTRY", None)
    if not isinstance(entry, Entry):
        raise ConfigError(
            f"entry file {str(path)!r}: expected ENTRY = moeca_fx.registry.Entry(...), found {type(entry).__name__}; "
            "docs/registry.md has a template"
        )
    return register(entry)


def matching(model: nn.Module) -> dict[str, Entry]:
    """The entry of every module of a model that has one, by the module's path.

    Raises:
        ConfigError: two entries match one module, or modules inside of one another.
    """
    found: dict[str, Entry] = {}
    for path, module in model.named_modules():
        mine = [entry for entry in _entries.values() if entry.matches(module)]
        around = [other for other in found if path.startswith(f"{other}.") or other == ""]
        if len(mine) > 1 or (mine and around):
            names = ", ".join(repr(entry.name) for entry in [*(found[other] for other in around), *mine])
            where = f"{path or 'the model'}" + (f" and {around[0] or 'the model'} around it" if around else "")
            raise ConfigError(
                f"{where}: expected one registered entry, found {names}; unregister one of them, or narrow its match",
                code=Reason.ENTRIES_CLASH,
            )
        if mine:
            found[path] = mine[0]
    return found
