"""Triton kernels."""

from moeca_fx.kernels.triton_gpu.decide import decide
from moeca_fx.kernels.triton_gpu.plan import plan

__all__ = ["decide", "plan"]
