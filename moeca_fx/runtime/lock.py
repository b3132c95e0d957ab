"""One thread at a time probes or traces: a model carries hooks and other methods meanwhile, and torch has global state.

Transformed models are run by as many threads as there are models.
"""

import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

TRACING = threading.RLock()
"""Held meanwhile."""

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def one_at_a_time(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A function that probes or traces."""

    @functools.wraps(function)
    def locked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with TRACING:
            return function(*args, **kwargs)

    return locked
