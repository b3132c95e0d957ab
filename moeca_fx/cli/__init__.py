"""The command ``moeca-fx``: ``demo``, ``inspect`` and ``sample``. Needs the extra ``cli``.

This module imports neither typer nor rich, so that the command can say what is missing instead of failing to
start.
"""

import sys
from typing import TYPE_CHECKING, Any

from moeca_fx.errors import MissingExtraError, require

if TYPE_CHECKING:
    from moeca_fx.cli.root import app

__all__ = ["app", "main"]

USAGE_ERROR = 2
"""Exit code of every error that the user can mend, as for a wrong option."""


def main() -> None:
    """Run the command line; never returns.

    Exit codes: 0 done, 1 for ``doctor`` a model that does not transform, 2 an error with its reason on stderr, 130
    interrupted.
    """
    try:
        require("typer", "cli")
        require("rich", "cli")
    except MissingExtraError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(USAGE_ERROR) from None
    from moeca_fx.cli.root import app

    app()


def __getattr__(name: str) -> Any:
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require("typer", "cli")
    require("rich", "cli")
    from moeca_fx.cli.root import app

    return app
