"""Find a policy for a target: candidates from calibrated schedules, tried on calibration latents, checked on others."""

from moeca_fx.tuning.search import Tuned, tune
from moeca_fx.tuning.target import Target, parse_target

__all__ = ["Target", "Tuned", "parse_target", "tune"]
