"""Experts some of which have adapters (LoRA through peft): they are alike no more, and so no list of experts.

experts.0.w  Linear        experts.1.w  peft Linear: base_layer, lora_A, lora_B        experts.2.w  Linear
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

WAY_OUT = "merge the adapters, merge_and_unload() or of a pipeline pipe.fuse_lora(), or give every expert one"
Kind = tuple[type[nn.Module], tuple[tuple[int, ...], ...]]


@dataclass(frozen=True)
class UnevenList:
    """A list of modules some of which have adapters.

    Attributes:
        path: of the list.
        adapted: names of those that have; count: of all.
        kind: class and sizes that all of them have without adapters.
    """

    path: str
    adapted: tuple[str, ...]
    count: int
    kind: Kind

    def __str__(self) -> str:
        names = ", ".join(self.adapted[:3]) + (" and more" if len(self.adapted) > 3 else "")
        return f"{self.path}: peft adapters are in {len(self.adapted)} of its {self.count} modules ({names}); {WAY_OUT}"


def unevenly_adapted(model: nn.Module) -> list[UnevenList]:
    """Every list whose modules would be alike without adapters, which some of them have."""
    found = []
    for path, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            continue
        children = dict(module.named_children())
        adapted = tuple(name for name, child in children.items() if any(map(_is_adapter, child.modules())))
        kinds = {kind_of(child) for child in children.values()}
        if adapted and len(adapted) < len(children) and len(kinds) == 1:
            found.append(UnevenList(path, adapted, len(children), kinds.pop()))
    return found


def kind_of(module: nn.Module) -> Kind:
    """Class and sizes of a module without its adapters."""
    return type(module), tuple(_base_sizes(module))


def of_kinds(uneven: Sequence[UnevenList], kinds: set[Kind]) -> list[UnevenList]:
    """The lists whose modules are of these kinds."""
    return [each for each in uneven if each.kind in kinds]


def adapter_states(model: nn.Module) -> list[str]:
    """What every adapter is set to: merged or not, on or off, its scale."""
    plain = (bool, int, float, str, list, tuple, dict)
    of_modules = vars(nn.Module()).keys()
    return [
        repr(
            {name: value for name, value in vars(module).items() if isinstance(value, plain) and name not in of_modules}
        )
        for module in model.modules()
        if _is_adapter(module)
    ]


def _is_adapter(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] == "peft"


def _base_sizes(module: nn.Module) -> list[tuple[int, ...]]:
    if _is_adapter(module) and isinstance(base := dict(module.named_children()).get("base_layer"), nn.Module):
        return _base_sizes(base)
    own = [tuple(parameter.shape) for parameter in module.parameters(recurse=False)]
    return own + [size for child in module.children() for size in _base_sizes(child)]
