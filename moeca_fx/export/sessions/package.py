"""A package of AOTInductor, run by torch; a graph's writes in place reach the caches that it is given."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from moeca_fx.errors import ExportError
from moeca_fx.export.graph import Port
from moeca_fx.export.sessions.base import Buffers
from moeca_fx.kernels.families import FAMILIES


class PackageSession:
    """One loaded package."""

    writes_in_place = False

    def __init__(self, path: Path, inputs: Sequence[Port], outputs: Sequence[Port]) -> None:
        for family in FAMILIES:  # the package calls their operations
            if family.device == "cpu" or torch.cuda.is_available():
                family.available()
        try:
            self.model = torch._inductor.aoti_load_package(str(path))
        except Exception as error:  # the loader's errors have no common type
            raise ExportError(
                f"{path}: torch cannot load it: {str(error).splitlines()[0]}; packages run with the version of torch "
                "that made them, export again"
            ) from error
        metadata = self.model.get_metadata()
        self.device = str(metadata.get("AOTI_DEVICE_KEY", "cpu"))

    def run(self, given: Sequence[Tensor], into: Buffers) -> Sequence[Tensor]:
        """See `Session.run`; every output is a tensor of its own."""
        made = self.model(*given)
        return [made] if isinstance(made, Tensor) else list(made)
