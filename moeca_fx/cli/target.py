"""TARGET of the command line: a zoo name, or ``package.module:factory`` for a model of your own."""

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from moeca_fx import zoo
from moeca_fx.errors import InputError, MoecaError, TargetError

HELP = "A zoo name (e.g. digits, dsmoe-s-e48), or package.module:factory."


@dataclass(frozen=True)
class Target:
    """A model with inputs it can be called with.

    Attributes:
        text: TARGET as it was given.
        model: the model, with its weights.
        inputs: positional example inputs.
        kwargs: keyword example inputs.
    """

    text: str
    model: nn.Module
    inputs: tuple[Any, ...]
    kwargs: dict[str, Any]


def load_target(text: str, weights: str | None = None, batch: int = 2) -> Target:
    """Build the model that TARGET names.

    A factory takes no argument, or one called ``batch``; it returns a model of a zoo class, or
    ``(model, example_inputs)``, or ``(model, example_inputs, example_kwargs)``. It is looked for in the
    working folder first, then where Python finds packages.

    Args:
        text: TARGET.
        weights: a local weights file or a hub id, loaded with ``strict=True``.
        batch: batch size of the example inputs.

    Raises:
        TargetError: TARGET names nothing, or the factory failed or returned something else.
        InputError: `batch` is below 1.
        WeightsError: the weights are missing, corrupt or do not fit.
    """
    if batch < 1:
        raise InputError(f"--batch must be at least 1, found {batch}")
    if ":" not in text:
        model = _build(text, weights)
        return Target(text, model, zoo.example_inputs(model, batch=batch), {})
    with _working_folder_importable():
        made = _call(text, _find_factory(text), batch)
    model, inputs, kwargs = _unpack(text, made, batch)
    if weights is not None:
        zoo.load_weights(model, weights)
    return Target(text, model, inputs, kwargs)


def _build(name: str, weights: str | None) -> nn.Module:
    try:
        return zoo.build(name, weights=weights)
    except TargetError as error:
        raise TargetError(f"{error}; a model of your own is given as package.module:factory") from error


def _find_factory(text: str) -> Callable[..., Any]:
    module_name, _, path = text.partition(":")
    if not module_name or not path:
        raise TargetError(f"TARGET {text!r}: expected package.module:factory, with a name on both sides of the colon")
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # importing runs the user's code, which may raise anything
        raise TargetError(
            f"TARGET {text!r}: importing {module_name} failed with {_brief(error)}; "
            "run from the folder that holds the package, or install it"
        ) from error
    for part in path.split("."):
        if not hasattr(found, part):
            public = [name for name, value in vars(found).items() if _is_offered(name, value, module_name)]
            offered = f"; it offers: {', '.join(sorted(public))}" if public else ""
            raise TargetError(f"TARGET {text!r}: {module_name} has no attribute {path!r}{offered}")
        found = getattr(found, part)
    if not callable(found):
        raise TargetError(f"TARGET {text!r}: expected a function that returns a model, found {type(found).__name__}")
    factory: Callable[..., Any] = found
    return factory


def _is_offered(name: str, value: Any, module: str) -> bool:
    """Whether a module defines this function or class itself, for others to use."""
    return not name.startswith("_") and callable(value) and getattr(value, "__module__", None) == module


def _call(text: str, factory: Callable[..., Any], batch: int) -> Any:
    try:
        arguments = {"batch": batch} if "batch" in inspect.signature(factory).parameters else {}
        return factory(**arguments)
    except MoecaError:
        raise
    except Exception as error:  # a factory is the user's code, which may raise anything
        raise TargetError(f"TARGET {text!r}: the factory failed with {_brief(error)}") from error


def _unpack(text: str, made: Any, batch: int) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    if isinstance(made, nn.Module):
        if not isinstance(made, zoo.DSMoE | zoo.DiTMoE):
            raise TargetError(
                f"TARGET {text!r}: the factory returned a {type(made).__name__} without inputs to call "
                "it with; "
                "return (model, example_inputs) or (model, example_inputs, example_kwargs)"
            )
        return made, zoo.example_inputs(made, batch=batch), {}
    if isinstance(made, tuple) and len(made) in (2, 3) and isinstance(made[0], nn.Module):
        model, inputs, *rest = made
        kwargs = rest[0] if rest else {}
        if isinstance(inputs, tuple | list) and isinstance(kwargs, dict):
            return model, tuple(inputs), kwargs
    raise TargetError(
        f"TARGET {text!r}: expected the factory to return a model, (model, example_inputs) or "
        f"(model, example_inputs, example_kwargs), found {_shape(made)}"
    )


def _shape(value: Any) -> str:
    if isinstance(value, tuple):
        return "(" + ", ".join(type(item).__name__ for item in value) + ")"
    return type(value).__name__


def _brief(error: Exception) -> str:
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def _working_folder_importable() -> Iterator[None]:
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
