"""Candidate expert sets: containers of structurally identical children with matrices of their own."""

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Candidate:
    """A container that may hold routed experts.

    Attributes:
        path: module path of the container.
        experts: path and module of each child, in order; empty for stacked parameters.
        nested: whether another candidate lies inside (then this is a list of blocks).
        stacked: whether the experts are rows of three-dimensional parameters of the container itself.
    """

    path: str
    experts: tuple[tuple[str, nn.Module], ...]
    nested: bool
    stacked: bool


def find_candidates(model: nn.Module) -> list[Candidate]:
    """Every container of >= 2 identical children with >= 2 matrices each, or of >= 2 stacked 3-D parameters."""
    found: dict[str, tuple[tuple[str, nn.Module], ...]] = {}
    for path, module in model.named_modules():
        children = [(f"{path}.{name}" if path else name, child) for name, child in module.named_children()]
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)) and _are_expert_like(children):
            found[path] = tuple(children)
        elif _has_stacked_experts(module):
            found[path] = ()
    return [
        Candidate(path, experts, nested=any(_is_inside(other, path) for other in found), stacked=not experts)
        for path, experts in found.items()
    ]


def _are_expert_like(children: list[tuple[str, nn.Module]]) -> bool:
    if len(children) < 2 or len({_signature(child) for _, child in children}) != 1:
        return False
    return sum(parameter.dim() == 2 for parameter in children[0][1].parameters()) >= 2


def _signature(module: nn.Module) -> tuple[Any, ...]:
    """Equal for modules of the same types with parameters of the same shapes under the same relative names."""
    return (
        tuple((name, type(child)) for name, child in module.named_modules()),
        tuple((name, tuple(parameter.shape)) for name, parameter in module.named_parameters()),
    )


def _has_stacked_experts(module: nn.Module) -> bool:
    shapes = [p.shape for p in module.parameters(recurse=False) if p.dim() == 3 and p.shape[0] > 1]
    return len(shapes) >= 2 and len({shape[0] for shape in shapes}) == 1


def _is_inside(path: str, container: str) -> bool:
    return path != container and (container == "" or path.startswith(container + "."))
