"""Find the mixture-of-experts regions of an unmodified model by structure, two probe runs and a numerical proof.

No class or attribute name is looked at: candidates come from the module tree (`candidates`); where they are dispatched
to, and what grows with the batch, from two runs of the model (`probe`); what a region computes from comparing it with
``sum_k weight_k * expert_k(x)`` (`prove`), as a method of its own (`method`) or router and all (`inline`). What is not
proven is refused with its reason.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from moeca_fx.batch import batch_size, doubled
from moeca_fx.discover.candidates import find_candidates
from moeca_fx.discover.on_meta import discover_on_meta
from moeca_fx.discover.probe import probe
from moeca_fx.discover.prove import prove
from moeca_fx.discover.records import Discovery, Layout, MoERegion, Refusal
from moeca_fx.model_checks import has_no_data

__all__ = ["Discovery", "Layout", "MoERegion", "Refusal", "discover"]


def discover(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Discovery:
    """Find and prove every token-level MoE region; runs the model twice. On the meta device, see `on_meta`.

    Where one sample leaves a region unproven, two more runs, on two and four samples, decide.

    Args:
        model: a model in eval mode; left as it was.
        args, kwargs: example inputs of its forward.

    Returns:
        The proven regions and the refused candidates, each with its reason.
    """
    with torch.no_grad():
        return _discover(model, args, kwargs)


def _discover(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Discovery:
    if has_no_data(model):
        return discover_on_meta(model, args, kwargs, discover)
    candidates = find_candidates(model)
    run = probe(model, candidates, args, kwargs)
    regions, refused = prove(model, candidates, run, args, kwargs)
    unproven = any(refusal.is_moe for refusal in refused)
    if unproven and not run.why_no_large and batch_size(args, kwargs) == 1:
        # A transposed axis of one sample needs no copy: its run has other operations than one of two samples.
        return _discover(model, *doubled(args, kwargs))
    return Discovery(regions=tuple(regions), refused=tuple(refused))
