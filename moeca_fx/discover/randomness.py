"""Random numbers that a model draws in eval mode: dropout left on, or the noise of a gate.

functional.dropout(x, 0.1)                     ("blocks.1.mlp", "aten.native_dropout.default")
logits + torch.randn_like(logits) * sigma      ("blocks.1.mlp.gate", "aten.randn_like.default")
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from moeca_fx.errors import UnsupportedModelError
from moeca_fx.reasons import Reason


def refuse_random(drawn: list[tuple[str, str]]) -> None:
    """Raise `UnsupportedModelError` for the first of (module path, operation)."""
    if drawn:
        path, operation = drawn[0]
        dropout = "dropout" in operation or "bernoulli" in operation
        what = "dropout is left on" if dropout else "noise is added, as a noisy gate does in training"
        raise UnsupportedModelError(
            f"{path or 'the model'}: draws random numbers in eval mode ({operation}): {what}; no two calls agree, so "
            "neither proof nor cache is possible: draw them if self.training only",
            code=Reason.RANDOM,
        )


class RandomLog(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves __init_subclass__ untyped
    """Records which module drew random numbers, by which operation."""

    def __init__(self, running: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in torch
        self.running = running
        self.drawn: list[tuple[str, str]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags and not _draws_nothing(func, args, kwargs or {}):
            self.drawn.append((self.running[-1] if self.running else "", str(func)))
        return func(*args, **(kwargs or {}))


def _draws_nothing(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Attention and dropout operations are random by tag, but draw only with a probability above 0."""
    named = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | dict(kwargs)
    probability = named.get("dropout_p", named.get("p"))
    if "dropout" in str(func) or "attention" in str(func):
        return not probability or named.get("train") is False
    return False


@contextmanager
def tracked(model: nn.Module, running: list[str]) -> Iterator[None]:
    """Keep `running` equal to the stack of modules that are executing."""
    handles: list[Any] = []
    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda _module, _args, path=path: running.append(path)))
        handles.append(module.register_forward_hook(lambda _module, _args, _output: _leave(running)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _leave(running: list[str]) -> None:
    running.pop()
