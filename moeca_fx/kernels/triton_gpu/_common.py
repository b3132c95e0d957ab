"""What all kernels share: the interpreter switch, block sizes, rounding helpers."""

import triton
import triton.language as tl
from torch import Tensor

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's CPU interpreter: TRITON_INTERPRET=1 was set when this package was imported."""


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << max(size - 1, 0).bit_length()


def blocks(size: int, block: int) -> int:
    """How many blocks cover `size`."""
    return -(-size // block)


def contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Each tensor in row-major order; free when it is already."""
    return tuple(tensor.contiguous() for tensor in tensors)


@triton.jit
def matmul(a, b, total, IEEE: tl.constexpr, UPCAST: tl.constexpr):
    """``total + a @ b`` in fp32.

    `IEEE` keeps fp32 inputs exact (no TF32). `UPCAST` is for the interpreter, which holds bf16 as integers.
    """
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    if IEEE:
        return tl.dot(a, b, total, input_precision="ieee")
    else:
        return tl.dot(a, b, total)
