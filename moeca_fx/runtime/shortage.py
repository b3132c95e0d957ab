"""Running out of memory in a step: recognised on every device, and told with the sizes and options that matter."""

import torch

from moeca_fx.errors import OutOfMemoryError
from moeca_fx.runtime.memory import MemoryReport

# How torch's allocators for CPUs begin; on other devices it raises torch.OutOfMemoryError.
_CPU_ALLOCATOR = "DefaultCPUAllocator"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, torch's CPU allocator or Python refused memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _CPU_ALLOCATOR in str(error)


def out_of_memory(error: BaseException, held: MemoryReport, expected: int, batch: int) -> OutOfMemoryError:
    """The error to raise instead of the allocator's; it keeps nothing of the failed step alive.

    Args:
        held: caches of all contexts when it happened.
        expected: bytes of cache that one context takes for this batch (`estimate_memory`).
        batch: samples of the call.
    """
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return OutOfMemoryError(
        f"out of memory in a step of {batch} samples: {first_line}. The caches of all contexts held "
        f"{held.total / 2**20:.1f} MiB; estimate_memory gives {expected / 2**20:.1f} MiB for a context of {batch} "
        "samples. The caches of this context were dropped and the model goes on with a new trajectory: transform it "
        f"with chunk={max(1, batch // 2)} (fewer samples at once), cache_dtype='bf16' or 'fp8' (smaller caches) or "
        "cache_limit='...MB' (no cache for samples beyond it), or sample smaller batches"
    )
