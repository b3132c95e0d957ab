"""Caching policies: when a step is full, what is recomputed, what a reused value is; and the named methods."""

from moeca_fx.policies.methods.moeca import MoECa
from moeca_fx.policies.policy import Method, Policy
from moeca_fx.policies.registry import as_method, build, load, names, save

__all__ = ["Method", "MoECa", "Policy", "as_method", "build", "load", "names", "save"]
