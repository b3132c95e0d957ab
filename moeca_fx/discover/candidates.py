"""Candidate expert sets: structurally identical modules with matrices of their own, or stacked parameters.

    ModuleList / ModuleDict of children        container.0, container.1, ...
    attributes of a module                     layer.expert_a, layer.expert_b
    stacked parameters                         layer.gate_up_proj [E, ..], layer.down_proj [E, ..]

Children without parameters (identity, zero) may stand among them. What routes to them is not looked at here.
"""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Candidate:
    """What may hold routed experts.

    Attributes:
        path: module path of the container; of the module itself for attributes and stacked parameters.
        experts: path and module of each child, in order; empty for stacked parameters.
        nested: whether another candidate lies inside (then this is a list of blocks).
        stacked: how many experts are rows of three-dimensional parameters of the container itself; 0 for children.
        attributes: whether the experts are attributes of a module with other children.
    """

    path: str
    experts: tuple[tuple[str, nn.Module], ...]
    nested: bool = False
    stacked: int = 0
    attributes: bool = False

    @property
    def count(self) -> int:
        """Number of experts."""
        return self.stacked or len(self.experts)


def find_candidates(model: nn.Module) -> list[Candidate]:
    """Every set of >= 2 identical modules with >= 2 matrices each, and of >= 2 stacked 3-D parameters."""
    found: list[Candidate] = []
    for path, module in model.named_modules():
        children = [(f"{path}.{name}" if path else name, child) for name, child in module.named_children()]
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            if _are_expert_like(children):
                found.append(Candidate(path, tuple(children)))
        elif stacked := _stacked_experts(module):
            found.append(Candidate(path, (), stacked=stacked))
        else:
            found += [Candidate(path, group, attributes=True) for group in _alike(children)]
    inside = [candidate.path for candidate in found if not candidate.attributes]
    kept = [c for c in found if not (c.attributes and any(_holds(c, other) for other in inside))]
    return [
        replace(c, nested=any(_is_inside(other, expert) for other in inside for expert, _ in c.experts)) for c in kept
    ]


def _holds(candidate: Candidate, path: str) -> bool:
    return any(path == expert or _is_inside(path, expert) for expert, _ in candidate.experts)


def _are_expert_like(children: list[tuple[str, nn.Module]]) -> bool:
    """At least two of one structure, and besides them only modules without parameters."""
    full = [child for _, child in children if next(child.parameters(), None) is not None]
    if len(full) < 2 or len({_signature(child) for child in full}) != 1:
        return False
    return _matrices(full[0]) >= 2


def _alike(children: list[tuple[str, nn.Module]]) -> list[tuple[tuple[str, nn.Module], ...]]:
    """Children of one structure with matrices."""
    groups: dict[Any, list[tuple[str, nn.Module]]] = {}
    for path, child in children:
        if not isinstance(child, (nn.ModuleList, nn.ModuleDict)) and _matrices(child) >= 2:
            groups.setdefault(_signature(child), []).append((path, child))
    return [tuple(group) for group in groups.values() if len(group) >= 2]


def _matrices(module: nn.Module) -> int:
    return sum(parameter.dim() == 2 for parameter in module.parameters())


def _signature(module: nn.Module) -> tuple[Any, ...]:
    """Equal for modules of the same types with parameters of the same shapes under the same relative names."""
    return (
        tuple((name, type(child)) for name, child in module.named_modules()),
        tuple((name, tuple(parameter.shape)) for name, parameter in module.named_parameters()),
    )


def _stacked_experts(module: nn.Module) -> int:
    """How many experts the module's own parameters stack; 0 when they do not."""
    own: list[Tensor] = [p for p in module.parameters(recurse=False) if p.dim() == 3 and p.shape[0] > 1]
    matrices = [p.shape[0] for p in own if min(p.shape[1:]) > 1]
    return int(matrices[0]) if len(matrices) >= 2 and len(set(matrices)) == 1 else 0


def _is_inside(path: str, container: str) -> bool:
    return path != container and (container == "" or path.startswith(container + "."))
