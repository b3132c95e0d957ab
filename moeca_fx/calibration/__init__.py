"""Calibration: find when a step is full and what a skipped output is, from a few recorded trajectories.

record -> how the sampler moves (`Law`) -> what an error does to the image (`Metric`) -> schedule (dynamic programming)
-> weights (least squares along the cached trajectory) -> polish (local search on the images themselves).
"""

from moeca_fx.calibration.calibrate import calibrate, fit_weights
from moeca_fx.calibration.calibration import Calibration
from moeca_fx.calibration.law import Law, find_law
from moeca_fx.calibration.metric import Metric, image_metric, state_metric
from moeca_fx.calibration.polish import polish
from moeca_fx.calibration.record import Model, Recording, Sampler, record
from moeca_fx.calibration.replay import Replay
from moeca_fx.calibration.schedule_search import best_schedule, gap_costs
from moeca_fx.calibration.teacache import fit_teacache

__all__ = [
    "Calibration",
    "Law",
    "Metric",
    "Model",
    "Recording",
    "Replay",
    "Sampler",
    "best_schedule",
    "calibrate",
    "find_law",
    "fit_teacache",
    "fit_weights",
    "gap_costs",
    "image_metric",
    "polish",
    "record",
    "state_metric",
]
