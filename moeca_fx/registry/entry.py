"""An entry: how the routed part of one kind of module is called, in code that torch.export can trace.

forward(self, x):                                        route(module, x)  -> rows, ids, weights
  rows = x.flatten(0, 1)                                 experts(module)   -> a module an expert
  weights, ids = gate(rows).softmax(-1).topk(2)    -->   finish(module, routed, x) -> the result
  ... any dispatch, with experts of any form ...
  return routed.view_as(x) + shared(x)                   the middle is left to the compiler
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from moeca_fx.errors import ConfigError

LAYOUTS = ("token", "expert")


@dataclass(frozen=True)
class Entry:
    """What a module computes: ``finish(sum over experts of weight * expert(rows))``.

    Attributes:
        name: its own among all entries; messages use it.
        match: a class of modules, or a function that says of a module whether the entry is for it.
        route: ``(module, *args, **kwargs) -> (rows, ids, weights)`` with the arguments of the call. Token layout: rows
            [.., H], ids int64 [.., k] and weights [.., k], in 0 <= id < E. Expert layout: rows [B, T, H] or [B*T, H],
            chosen tokens int64 [B, E, C], 0 <= token < T within their sample and distinct for an expert, and weights
            [B, E, C]. Tensor operations only; nothing that reads data.
        experts: ``module -> [expert, ..]``, modules of rows [M, H] -> [M, H] in order of expert id: submodules of the
            module, or modules over slices of its stacked parameters (`moeca_fx.registry.slices`); no copies.
        finish: ``(module, routed, *args, **kwargs) -> result`` of the call, `routed` in the shape of the rows: shared
            experts, reshapes, tuples. None when the routed sum is the result.
        region: the method of the module that is replaced.
        layout: ``"token"`` where tokens choose their experts, ``"expert"`` where experts choose their tokens.
        empty_slots: whether an id may be E, which means no expert; of token layout alone.
        prefer: use the entry without trying to prove the module automatically first.

    Raises:
        ConfigError: a field is of the wrong kind.
    """

    name: str
    match: type[nn.Module] | Callable[[nn.Module], bool]
    route: Callable[..., tuple[Tensor, Tensor, Tensor]]
    experts: Callable[[Any], Sequence[nn.Module]]
    finish: Callable[..., Any] | None = None
    region: str = "forward"
    layout: Literal["token", "expert"] = "token"
    empty_slots: bool = False
    prefer: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ConfigError(f"entry: expected a name, found {self.name!r}; name it after the layer")
        for field in ("match", "route", "experts", "finish"):
            value = getattr(self, field)
            if not callable(value) and not (field == "finish" and value is None):
                raise ConfigError(
                    f"entry {self.name!r}: {field}: expected a function, found {type(value).__name__}; see "
                    "docs/registry.md for a template"
                )
        if self.layout not in LAYOUTS:
            raise ConfigError(f"entry {self.name!r}: layout: expected one of {LAYOUTS}, found {self.layout!r}")
        if self.empty_slots and self.layout == "expert":
            raise ConfigError(
                f"entry {self.name!r}: empty_slots: expected False in expert layout, where experts fill their slots; "
                "drop it"
            )

    def matches(self, module: nn.Module) -> bool:
        """Whether the entry is for this module."""
        if isinstance(self.match, type):
            return isinstance(module, self.match)
        return bool(self.match(module))
