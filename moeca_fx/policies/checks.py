"""Checks of policy fields: every mistake becomes one `ConfigError` that names the field and what it takes."""

import math
from types import UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from moeca_fx.errors import ConfigError


def out_of_range(owner: object, name: str, expected: str, found: object) -> ConfigError:
    """The error of field `name` of the config `owner`."""
    return ConfigError(
        f"{type(owner).__name__}.{name}: expected {expected}, found {found!r}; pass a value in that range"
    )


def check_types(owner: Any) -> None:
    """Raise unless every field of the dataclass `owner` has the type it is annotated with; numbers are finite."""
    for name, hint in get_type_hints(type(owner)).items():
        if get_origin(hint) is not ClassVar and not _fits(getattr(owner, name), hint):
            where, found = f"{type(owner).__name__}.{name}", getattr(owner, name)
            raise ConfigError(f"{where}: expected {_text(hint)}, found {found!r}; pass a value of that kind")


_TEXTS = {int: "an integer", float: "a finite number", bool: "true or false", str: "a text", type(None): "nothing"}


def _text(hint: Any) -> str:
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, parts))
    if origin in (Union, UnionType):
        return " or ".join(map(_text, parts))
    return _TEXTS.get(hint) or str(hint)


def _fits(value: object, hint: Any) -> bool:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return isinstance(value, str) and value in parts
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        wanted = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        return len(value) == len(wanted) and all(map(_fits, value, wanted))
    if hint is int or hint is float:
        number = isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
        return number and math.isfinite(value)  # type: ignore[arg-type]
    return isinstance(value, hint)


def check_integer(owner: Any, name: str, at_least: int, at_most: int | None = None) -> None:
    """Raise unless the field is an integer in the range."""
    value = getattr(owner, name)
    fits = isinstance(value, int) and not isinstance(value, bool) and value >= at_least
    if not fits or (at_most is not None and value > at_most):
        upper = f" and <= {at_most}" if at_most is not None else ""
        raise out_of_range(owner, name, f"an integer >= {at_least}{upper}", value)


def check_number(owner: Any, name: str, expected: str = "a finite number >= 0", upper: float = math.inf) -> None:
    """Raise unless the field is a finite number in [0, upper)."""
    value = getattr(owner, name)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not 0 <= value < upper:
        raise out_of_range(owner, name, expected, value)


def check_choice(owner: Any, name: str, choices: tuple[str, ...]) -> None:
    """Raise unless the field is one of `choices`."""
    value = getattr(owner, name)
    if not isinstance(value, str) or value not in choices:
        raise out_of_range(owner, name, "one of " + ", ".join(map(repr, choices)), value)
