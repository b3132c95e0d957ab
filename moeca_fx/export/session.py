"""An ONNX artefact in onnxruntime, on torch tensors: inputs and outputs are bound where they lie."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeca_fx.errors import ExportError, require

EXTRA = "onnx"
CPU = "CPUExecutionProvider"
_ELEMENTS = {
    torch.float32: 1,
    torch.uint8: 2,
    torch.int8: 3,
    torch.int32: 6,
    torch.int64: 7,
    torch.bool: 9,
    torch.float16: 10,
    torch.float64: 11,
    torch.bfloat16: 16,
}
"""ONNX's numbers for element types."""


class OnnxSession:
    """One loaded artefact.

    Args:
        path: the ONNX file.
        providers: execution providers, the best first; onnxruntime falls back to a CPU silently, which is an error here
            unless `strict` is off.
        threads: CPU threads; None takes torch's.
    """

    def __init__(
        self, path: Path, providers: Sequence[str], *, strict: bool = True, threads: int | None = None
    ) -> None:
        _check_packages()
        require("onnxruntime", EXTRA)
        import onnxruntime

        available = onnxruntime.get_available_providers()
        missing = [name for name in providers if name not in available]
        if missing and strict:
            raise ExportError(
                f"onnxruntime has no {', '.join(missing)} here, only {', '.join(available)}; "
                "install the package that brings it, or ask for another provider"
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
        except Exception as error:  # onnxruntime's own exception types are not public
            raise ExportError(f"{path}: onnxruntime cannot load it: {str(error).splitlines()[0]}") from error
        found = self.session.get_providers()
        if strict and found[: len(providers)] != list(providers):
            raise ExportError(f"{path}: asked for {', '.join(providers)}, onnxruntime runs it on {', '.join(found)}")
        self.device = "cuda" if found[0] != CPU else "cpu"

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs."""
        return [item.name for item in self.session.get_inputs()]

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs."""
        return [item.name for item in self.session.get_outputs()]

    def run(self, given: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
        """Run it once.

        Args:
            given: every input, contiguous.
            into: every output, which is written where it lies; it must not share memory with an input.
        """
        binding = self.session.io_binding()
        for name, tensor in given.items():
            binding.bind_input(name, *self._place(tensor))
        for name, tensor in into.items():
            binding.bind_output(name, *self._place(tensor))
        self.session.run_with_iobinding(binding)

    def _place(self, tensor: Tensor) -> tuple[Any, ...]:
        if not tensor.is_contiguous() or tensor.device.type != self.device:
            raise ExportError(
                f"expected a contiguous tensor on {self.device}, found one on {tensor.device} with strides "
                f"{tensor.stride()}"
            )
        index = tensor.device.index or 0
        return tensor.device.type, index, _ELEMENTS[tensor.dtype], list(tensor.shape), tensor.data_ptr()


def _check_packages() -> None:
    """Two builds of onnxruntime share one folder, and whichever was installed last wins."""
    from importlib import metadata

    builds = [
        name for name in ("onnxruntime", "onnxruntime-gpu", "onnxruntime-trt-rtx") if _is_installed(name, metadata)
    ]
    if len(builds) > 1:
        raise ExportError(
            f"{' and '.join(builds)} are both installed and overwrite each other's files; uninstall all of them, then "
            "install one"
        )


def _is_installed(name: str, metadata: Any) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True
