"""One storage for the parameters of all experts of a layer, without a second copy of the weights.

The stack [E, ...] owns the memory; every expert's own parameter is re-pointed at its slice, so that the original
modules, their `state_dict` and the vectorised graph read the same bytes.
"""

import ctypes
import sys
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from moeca_fx.discover.experts import expert_modules
from moeca_fx.discover.records import MoERegion


def stack_experts(model: nn.Module, regions: Sequence[MoERegion]) -> None:
    """Stack the experts of every region of `model`, in place; what is stacked already stays."""
    for region in regions:
        if region.form is None:  # else the model stacks them itself
            stack_in_place(expert_modules(model, region))
        _return_freed_memory()


def stack_in_place(modules: Sequence[nn.Module]) -> None:
    """Give equal parameters of `modules` one common storage each; values and `Parameter` objects stay the same."""
    for name, _ in modules[0].named_parameters():
        parameters = [module.get_parameter(name) for module in modules]
        if stacked_view(parameters) is None:
            stack = torch.stack([parameter.detach() for parameter in parameters])
            for parameter, row in zip(parameters, stack, strict=True):
                parameter.data = row


def _return_freed_memory() -> None:
    """Give the experts' former memory back to the system: glibc keeps freed blocks of their size for blocks alike."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def stacked_view(tensors: Iterable[Tensor]) -> Tensor | None:
    """The [E, ...] view over tensors that are consecutive slices of one storage; None when they are not."""
    parts = [tensor.detach() for tensor in tensors]
    first = parts[0]
    step = first.numel()
    for index, part in enumerate(parts):
        same_storage = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        expected = first.storage_offset() + index * step
        if not same_storage or part.storage_offset() != expected or not part.is_contiguous():
            return None
    return first.as_strided((len(parts), *first.shape), (step, *first.stride()), first.storage_offset())
