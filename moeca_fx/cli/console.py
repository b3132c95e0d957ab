"""Where the command writes: results to stdout, everything else (progress, warnings, errors) to stderr."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

WIDTH_OF_A_PIPE = 120
"""Columns of a table that goes into a file or a pipe, which have no width of their own."""

REFRESHES_PER_SECOND = 4
"""Of a progress bar: seldom, because it shares the cores with what is being timed."""


def stdout() -> Console:
    """Console for results."""
    return Console(width=_width(sys.stdout))


def stderr() -> Console:
    """Console for progress, warnings and errors."""
    return Console(stderr=True, width=_width(sys.stderr))


def _width(stream: TextIO) -> int | None:
    """None lets rich ask the terminal, or the variable COLUMNS."""
    return None if stream.isatty() or "COLUMNS" in os.environ else WIDTH_OF_A_PIPE


def show_error(error: Exception) -> None:
    """One red line on stderr; the text is printed as it is, brackets included."""
    _tell("error: ", "bold red", str(error))


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Inside the block a Python warning becomes one yellow line on stderr, without file and line.

    Warnings for programmers (deprecations inside the libraries used) are left out: they say nothing about the run.
    """
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        warnings.showwarning = _show_warning
        yield


class _Lines(logging.Handler):
    """Log records as dim lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        style = "bold yellow" if record.levelno >= logging.WARNING else "dim"
        stderr().print(Text(record.getMessage(), style), soft_wrap=True)


@contextmanager
def compiler_lines() -> Iterator[None]:
    """Inside the block what the compiler and the kernels' build tell appears on stderr: both take their time."""
    loggers = [logging.getLogger(name) for name in ("moeca_fx.compile", "moeca_fx.kernels")]
    handler = _Lines(logging.INFO)
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)


def step_progress() -> Progress:
    """A progress bar over denoising steps, on stderr."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=stderr(),
        refresh_per_second=REFRESHES_PER_SECOND,
        transient=True,
    )


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: str | None = None,
) -> None:
    _tell("warning: ", "bold yellow", str(message))


def _tell(prefix: str, style: str, text: str) -> None:
    stderr().print(Text.assemble((prefix, style), text), soft_wrap=True)
