"""A ``.pt2`` file of torch.export, run by torch."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind, OutputKind

from moeca_fx.errors import ExportError
from moeca_fx.export.graph import Port
from moeca_fx.export.sessions.base import Buffers, check_names


def open_program(path: Path) -> torch.export.ExportedProgram:
    """Read a ``.pt2`` file.

    Raises:
        ExportError: torch cannot.
    """
    try:
        return torch.export.load(path)
    except Exception as error:  # torch raises what zip files, pickles and its own schema raise
        raise ExportError(f"{path}: torch cannot load it: {str(error).splitlines()[0]}; export again") from error


class ProgramSession:
    """One loaded program."""

    writes_in_place = False

    def __init__(self, path: Path, inputs: Sequence[Port], outputs: Sequence[Port]) -> None:
        program = open_program(path)
        signature = program.graph_signature
        taken = [spec for spec in signature.input_specs if spec.kind is InputKind.USER_INPUT]
        given = [spec for spec in signature.output_specs if spec.kind is OutputKind.USER_OUTPUT]
        counted = [[port.name for port in ports] for ports in (inputs, outputs)]
        if [len(taken), len(given)] != [len(names) for names in counted]:
            check_names(path, [[str(spec.arg) for spec in specs] for specs in (taken, given)], inputs, outputs)
        self.module = program.module()
        self.device = next((tensor.device.type for tensor in self.module.state_dict().values()), "cpu")

    def run(self, given: Sequence[Tensor], into: Buffers) -> Sequence[Tensor]:
        """See `Session.run`; every output is a tensor of its own."""
        with torch.no_grad():
            made: Sequence[Tensor] = self.module(*given)
        return made
