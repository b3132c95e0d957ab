"""Checks of policy fields: every mistake becomes one `ConfigError` that names the field and what it takes."""

import math
from typing import Any

from moeca_fx.errors import ConfigError


def out_of_range(owner: object, name: str, expected: str, found: object) -> ConfigError:
    """The error of field `name` of the config `owner`."""
    return ConfigError(
        f"{type(owner).__name__}.{name}: expected {expected}, found {found!r}; pass a value in that range"
    )


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
