"""moeca_fx: a compiler that makes mixture-of-experts diffusion transformers reuse expert branches across steps.

fast = moeca_fx.transform(model, example_inputs=(x, t, y), policy=moeca_fx.MoECa(interval=4))
pipe = moeca_fx.apply(pipe, policy=moeca_fx.MoECa(interval=4))  # a diffusers pipeline
"""

from moeca_fx import errors, policies, registry, zoo
from moeca_fx.diagnosis import doctor
from moeca_fx.inspection import inspect
from moeca_fx.pipelines import apply, remove, stats
from moeca_fx.policies import MoECa
from moeca_fx.registry import register, unregister
from moeca_fx.runtime.advice import CacheLimitWarning, NothingReusedWarning, OtherLengthWarning
from moeca_fx.transform import estimate_memory, transform
from moeca_fx.tuning import tune

__version__ = "0.1.0"

__all__ = [
    "CacheLimitWarning",
    "MoECa",
    "NothingReusedWarning",
    "OtherLengthWarning",
    "__version__",
    "apply",
    "doctor",
    "errors",
    "estimate_memory",
    "inspect",
    "policies",
    "register",
    "registry",
    "remove",
    "stats",
    "transform",
    "tune",
    "unregister",
    "zoo",
]
