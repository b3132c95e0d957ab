"""What a file of numbers says about where they come from; holds no host name and no path."""

import hashlib
import platform
from typing import Any

import torch
from torch import Tensor

import moeca_fx


def provenance(*, compiled: bool = False) -> dict[str, Any]:
    """Versions and environment of this process, JSON-able; measurements run on a CPU in float32.

    Args:
        compiled: whether transformed models ran through torch.compile.
    """
    return {
        "versions": {
            "moeca_fx": moeca_fx.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "environment": {
            "device": "cpu",
            "dtype": "float32",
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "torch_compile": compiled,
        },
    }


def fingerprint(*parts: str | Tensor) -> str:
    """Identifies tensors by their bytes, and the names between them; for records that hold for these alone."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            digest.update(part.encode())
        else:
            digest.update(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
