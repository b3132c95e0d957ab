"""Models to run the compiler on: DSMoE and DiT-MoE from their published facts, and two trained models.

Everything is imported when it is first asked for, so that ``import moeca_fx`` stays light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeca_fx.zoo.catalog import build, example_inputs, names
    from moeca_fx.zoo.dit_moe import DiTMoE, DiTMoEConfig
    from moeca_fx.zoo.dsmoe import DSMoE, DSMoEConfig
    from moeca_fx.zoo.initialize import randomize_
    from moeca_fx.zoo.loading import load_weights

__all__ = [
    "DSMoE",
    "DSMoEConfig",
    "DiTMoE",
    "DiTMoEConfig",
    "build",
    "example_inputs",
    "load_weights",
    "names",
    "randomize_",
]

_HOME = {
    "DSMoE": "dsmoe",
    "DSMoEConfig": "dsmoe",
    "DiTMoE": "dit_moe",
    "DiTMoEConfig": "dit_moe",
    "build": "catalog",
    "example_inputs": "catalog",
    "load_weights": "loading",
    "names": "catalog",
    "randomize_": "initialize",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
