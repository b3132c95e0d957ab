"""An ONNX artefact in onnxruntime, on torch tensors: inputs and outputs are bound where they lie."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeca_fx.errors import ExportError, require
from moeca_fx.export.graph import Port
from moeca_fx.export.lengths import LENGTHS
from moeca_fx.export.sessions.base import Buffers, check_names

EXTRA = "onnx"
CPU = "CPUExecutionProvider"
NO_BF16 = (
    "onnxruntime has no bf16 on a CPU: export in fp16 or fp32 (dtype, --dtype), run it on another provider, or leave "
    "the check out (check=False, --no-verify)"
)
_SLOWER_ON_CPU = ["SkipLayerNormFusion"]
"""Rewrites of onnxruntime that cost time there: its fused sum and norm takes twice as long as the two."""

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
        inputs, outputs: that it must have.
        providers: execution providers, the best first; onnxruntime falls back to a CPU silently, which is an error here
            unless `strict` is off.
        threads: CPU threads; None takes torch's.
    """

    def __init__(
        self,
        path: Path,
        inputs: Sequence[Port],
        outputs: Sequence[Port],
        providers: Sequence[str],
        *,
        strict: bool = True,
        threads: int | None = None,
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
        if tuple(providers) == (CPU,) and any(port.dtype is torch.bfloat16 for port in (*inputs, *outputs)):
            raise ExportError(f"{path}: {NO_BF16}")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 3
        # Between steps the sampler runs in torch, or another step in another session: idle threads must not spin.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            self.session = onnxruntime.InferenceSession(
                str(path),
                options,
                providers=list(providers),
                disabled_optimizers=_SLOWER_ON_CPU if tuple(providers) == (CPU,) else [],
            )
        except Exception as error:  # onnxruntime's own exception types are not public
            raise ExportError(f"{path}: onnxruntime cannot load it: {str(error).splitlines()[0]}") from error
        found = self.session.get_providers()
        if strict and found[: len(providers)] != list(providers):
            raise ExportError(f"{path}: asked for {', '.join(providers)}, onnxruntime runs it on {', '.join(found)}")
        self.device = "cuda" if found[0] != CPU else "cpu"
        self.writes_in_place = found == [CPU]  # what other providers do was never seen
        self.inputs = [item.name for item in self.session.get_inputs()]
        self.outputs = [item.name for item in self.session.get_outputs()]
        check_names(path, [self.inputs, self.outputs], inputs, outputs)

    def run(self, given: Sequence[Tensor], into: Buffers) -> Sequence[Tensor]:
        """See `Session.run`; a buffer shares memory with an input only where `in_place` found that it may."""
        binding = self.session.io_binding()
        made = into()
        for name, tensor in zip(self.inputs, given, strict=True):
            binding.bind_input(name, *self._place(tensor, of_the_step=not tensor.dim() or name == LENGTHS))
        for name, tensor in zip(self.outputs, made, strict=True):
            binding.bind_output(name, *self._place(tensor))
        if self.device == "cuda":  # onnxruntime has a stream of its own, and waits for that alone
            torch.cuda.current_stream().synchronize()
        self.session.run_with_iobinding(binding)
        return made

    def _place(self, tensor: Tensor, *, of_the_step: bool = False) -> tuple[Any, ...]:
        here = tensor.device.type == self.device or of_the_step  # onnxruntime brings a step's own numbers itself
        if not tensor.is_contiguous() or not here:
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
