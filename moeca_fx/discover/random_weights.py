"""A layer without data as one with random numbers in a fraction of its memory, to see what its code computes.

    gate_up_proj [128, 2048, 2688] on meta, 2.8 GB     one pool of 5.5 M numbers, 22 MB: expert e reads it from 64 e on

The matrices of stacked experts overlap in memory and differ as functions: on the same row no two give the same.
Everything else initialises itself, or is normal.
"""

import copy
import math

import torch
from torch import Tensor, nn

from moeca_fx.discover.candidates import find_candidates
from moeca_fx.discover.inline.stacked import stacked_parameters

_STEP = 64  # numbers between two experts: grouped products want their matrices aligned


def with_random_weights(module: nn.Module) -> nn.Module:
    """A copy on the CPU, initialised as its parts initialise themselves; other parameters normal, buffers zero.

    Args:
        module: on the meta device; a replaced forward is left behind.
    """
    layer = copy.deepcopy(module)
    layer.__dict__.pop("forward", None)
    stacks = _taken_stacks(layer)
    layer = layer.to_empty(device="cpu")
    holders = [holder for holder, _, _ in stacks]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in layer.parameters():
            parameter.normal_(std=_size(parameter))
        for buffer in layer.buffers():
            buffer.zero_()
        for part in layer.modules():
            if callable(reset := getattr(part, "reset_parameters", None)) and part not in holders:
                reset()
        for holder, name, stack in stacks:
            holder.register_parameter(name, nn.Parameter(_overlapping(stack), requires_grad=False))
    return layer


def _taken_stacks(layer: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """(module, name, parameter) of every stacked matrix, which the module is left without."""
    found = []
    for candidate in find_candidates(layer):
        if candidate.stacked:
            holder = layer.get_submodule(candidate.path)
            matrices = stacked_parameters(holder, candidate.stacked).items()
            found += [(holder, name, tensor) for name, tensor in matrices if tensor.dim() == 3]
    for holder, name, _ in found:
        holder.register_parameter(name, None)  # keeps its place in the order of parameters
    return found


def _overlapping(stack: Tensor) -> Tensor:
    """Random numbers in the shape of `stack` [E, a, b], each expert's matrix a window of one pool."""
    count, rows, columns = stack.shape
    pool = torch.empty(rows * columns + _STEP * (count - 1), dtype=stack.dtype).normal_(std=_size(stack))
    return pool.as_strided(stack.shape, (_STEP, columns, 1))


def _size(parameter: Tensor) -> float:
    return 1 / math.sqrt(parameter.shape[-1]) if parameter.dim() > 1 else 0.02
