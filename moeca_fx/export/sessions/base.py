"""What a runtime asks of whatever runs a graph."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from moeca_fx.errors import ExportError
from moeca_fx.export.graph import Port

Buffers = Callable[[], list[Tensor]]


class Session(Protocol):
    """One loaded graph.

    Attributes:
        device: where its tensors lie, such as ``"cpu"`` or ``"cuda"``.
        writes_in_place: whether a cache's input and output may share a buffer, where the graph allows it.
    """

    device: str
    writes_in_place: bool

    def run(self, given: Sequence[Tensor], into: Buffers) -> Sequence[Tensor]:
        """Run it once.

        Args:
            given: every input in order, contiguous.
            into: makes a buffer for every output, for those that write where they are told.

        Returns:
            Every output in order.
        """
        ...


def check_names(path: Path, found: Sequence[Sequence[str]], inputs: Sequence[Port], outputs: Sequence[Port]) -> None:
    """Raise `ExportError` unless a file has the inputs and outputs of its manifest.

    Args:
        found: names of the file's inputs, and of its outputs.
    """
    given, made = [port.name for port in inputs], [port.name for port in outputs]
    if [list(names) for names in found] != [given, made]:
        odd = sorted({*found[0], *found[1]} ^ {*given, *made})
        raise ExportError(f"{path.name} and its manifest differ in inputs and outputs: {odd}; export again")
