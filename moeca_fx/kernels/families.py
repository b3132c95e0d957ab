"""The kernels of each kind of device as `lower_kernels` sees them: what there is, what it takes, why the rest stays."""

import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moeca_fx.kernels.cpu import ops as cpu

log = logging.getLogger("moeca_fx.kernels")

GPU_OFF = "MOECA_FX_GPU_KERNELS"
"""Environment variable: 0 keeps the reference operations on a GPU."""


@dataclass(frozen=True)
class Family:
    """The kernels of one kind of device.

    Attributes:
        name: in messages.
        device: type of the device that holds the weights.
        namespace: of its operations in `torch.ops`.
        dtypes: of weights and values.
        recompute: writes recomputed branches into the caches and returns these; see `kernels.cpu.ops`.
        takes_stored: whether they read and write caches in bfloat16 beside values in fp32.
        any_strides: whether experts' weights may lie in memory in any way, or need a unit stride.
        missing: rules of `lower_kernels` without a kernel here, with what serves instead.
        available: whether the kernels can run; says at its first call why not.
    """

    name: str
    device: str
    namespace: str
    dtypes: tuple[torch.dtype, ...]
    recompute: Callable[..., tuple[Tensor, Tensor | None]]
    takes_stored: bool
    any_strides: bool
    missing: Mapping[str, str]
    available: Callable[[], bool]

    def op(self, name: str) -> Any:
        """An operation, by its name in the namespace."""
        return getattr(getattr(torch.ops, self.namespace), name).default

    @property
    def unavailable(self) -> str:
        """What the pass says where they cannot run."""
        return f"the {self.name} kernels are not built" if self.device == "cpu" else f"there are no {self.name} kernels"


def recompute_branches_gpu(feature: Tensor, norm: Tensor | None, *operands: Any) -> tuple[Tensor, Tensor | None]:
    """`kernels.cpu.ops.recompute_branches` on a GPU."""
    torch.ops.moeca_gpu.recompute(feature, norm, *operands)
    return feature, norm


@functools.cache
def triton_is_there() -> bool:
    """Whether Triton is installed, for a GPU that it compiles for or in its interpreter; registers `moeca_gpu`."""
    if os.environ.get(GPU_OFF) == "0":
        log.info("GPU kernels are switched off by %s=0; reference operations run instead", GPU_OFF)
        return False
    if importlib.util.find_spec("triton") is None:
        log.warning("Triton is not installed; slower reference operations run on the GPU instead of its kernels")
        return False
    from torch.utils._triton import has_triton

    from moeca_fx.kernels.triton_gpu import INTERPRETED, ops

    assert ops.branches is not None  # imported for what it registers
    if not (INTERPRETED or has_triton()):
        log.warning("Triton finds no GPU that it compiles for; slower reference operations run instead of its kernels")
        return False
    return True


CPU = Family(
    name="CPU",
    device="cpu",
    namespace="moeca_cpu",
    dtypes=cpu.DTYPES,
    recompute=cpu.recompute_branches,
    takes_stored=True,
    any_strides=False,
    missing={},
    available=lambda: cpu.available(),
)
_FUSED = "generated code fuses it with what is around it"
GPU = Family(
    name="Triton",
    device="cuda",
    namespace="moeca_gpu",
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    recompute=recompute_branches_gpu,
    takes_stored=False,
    any_strides=True,
    missing={
        "mixture": _FUSED,
        "threshold": _FUSED,
        "update_activation": _FUSED,
        "decide_picked": "the kernel scores branches and takes no pick",
        "top_k": "the library's top-k stays",
        "norm": _FUSED,
        "attention": "the library's attention of all tokens stays",
    },
    available=lambda: triton_is_there(),
)
FAMILIES = (CPU, GPU)
