"""Caching policies: when a step is full, which branches are recomputed, what a reused value is."""

from moeca_fx.policies.moeca import MoECa

__all__ = ["MoECa"]
