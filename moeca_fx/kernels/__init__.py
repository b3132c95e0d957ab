"""Kernels: fused, device-specific forms of what `moeca_fx.ops` and `moeca_fx.policies` define."""
