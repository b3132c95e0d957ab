"""Kept features of several full steps, after some branches were computed anew.

change      = experts(x[picked]) - forecast_rows(clock, picked, cache_feature, cache_feature_1)
feature     = restart_rows(cache_feature, picked, change, hidden, new)         level corrected, trend kept; a branch
feature_1   = restart_rows(cache_feature_1, picked, change, hidden, new)       that the cache lacked has no trend
"""

import torch
from torch import fx

from moeca_fx.graph.sites import MoESite
from moeca_fx.graph.state import older
from moeca_fx.ops import forecast, slots
from moeca_fx.passes.cache.builder import StepBuilder


def correct_features(
    step: StepBuilder, site: MoESite, code: fx.Node, picked: fx.Node, local: fx.Node, hidden: fx.Node
) -> list[fx.Node]:
    """Kept features of computed branches: corrected by what the forecast missed, or begun anew where the expert is."""
    base, state = site.path.replace(".", "_"), f"{site.path}.feature"
    kept = step.kept(state)
    guess = step.emit(forecast.forecast_rows, step.clock, picked, *kept, name=f"{base}_guess_rows")
    change = step.emit(torch.sub, hidden, guess, name=f"{base}_missed")
    new = step.emit(slots.unmatched_rows, code, local, picked, site.top_k, name=f"{base}_new_rows")
    features = []
    for name, cache in zip(older(state, step.terms), kept, strict=True):
        node_name = "new_" + name.replace(".", "_")
        step.updated[name] = step.emit(forecast.restart_rows, cache, picked, change, hidden, new, name=node_name)
        features.append(step.updated[name])
    return features
