"""Where the tensors of graphs lie in a model's weights, so that graphs follow weights that move.

    model.blocks.0.experts.0.w  at 0x10, in a stack of 8        graph.w  [8, ..] at 0x10
    model.to("cuda"), experts stacked again           -->       graph.w  [8, ..] over the new stack

Without it a pipeline whose models are offloaded between requests would trace and compile anew in each of them.
Constants of a graph lie in no weight and stay where the graph was traced.
"""

from collections.abc import Iterable

from torch import Tensor, nn


class Bindings:
    """Of some graphs, to the weights of a model as they are now.

    Args:
        model: holds the weights.
        graphs: modules over the same memory.
    """

    def __init__(self, model: nn.Module, graphs: Iterable[nn.Module]) -> None:
        exact: dict[tuple[int, int], str] = {}
        first: dict[int, tuple[int, str]] = {}
        for name, tensor in named_tensors(model).items():
            offset = int(tensor.storage_offset())
            exact.setdefault((_storage(tensor), offset), name)
            first[_storage(tensor)] = min(first.get(_storage(tensor), (offset, name)), (offset, name))
        self._bound: list[tuple[Tensor, str, int]] = []
        seen = set()
        for tensor in (t for graph in graphs for t in (*graph.parameters(), *graph.buffers())):
            if id(tensor) not in seen and _storage(tensor) in first:
                lowest, name = first[_storage(tensor)]
                same = exact.get((_storage(tensor), int(tensor.storage_offset())))
                distance = int(tensor.storage_offset()) - lowest if same is None else 0
                self._bound.append((tensor, same or name, distance))
            seen.add(id(tensor))

    def follow(self, model: nn.Module) -> bool:
        """Point the graphs' tensors to the weights of `model`, which moved; False where they are laid out otherwise."""
        weights = named_tensors(model)
        moved = []
        for tensor, name, distance in self._bound:
            weight = weights[name].detach()
            try:
                moved.append(weight.as_strided(tensor.shape, tensor.stride(), weight.storage_offset() + distance))
            except RuntimeError:  # beyond its memory: what lay together does no longer
                return False
        for (tensor, _, _), new in zip(self._bound, moved, strict=True):
            tensor.data = new
        return True


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
