"""Find the mixture-of-experts regions of an unmodified model by structure, two probe runs and a numerical proof.

No class or attribute name is looked at: candidates come from the module tree (`candidates`); where they are dispatched
to, and what grows with the batch, from two runs of the model (`probe`); what a region computes from comparing it with
``sum_k weight_k * expert_k(x)`` (`prove`), as a method of its own (`method`) or router and all (`inline`), or, for
layers that cannot be found out, with what a registered entry says (`moeca_fx.registry`). What is not proven is refused
with its reason.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from moeca_fx.discover.candidates import find_candidates
from moeca_fx.discover.journal import Journal
from moeca_fx.discover.on_meta import discover_on_meta
from moeca_fx.discover.probe import probe, run_again
from moeca_fx.discover.prove import prove
from moeca_fx.discover.records import Discovery, Layout, MoERegion, Refusal
from moeca_fx.model_checks import has_no_data
from moeca_fx.registry.calls import recorded
from moeca_fx.registry.regions import left_to_discovery, with_entries
from moeca_fx.registry.store import matching

__all__ = ["Discovery", "Layout", "MoERegion", "Refusal", "discover"]


def discover(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], journal: Journal | None = None
) -> Discovery:
    """Find and prove every token-level MoE region; runs the model twice. On the meta device, see `on_meta`.

    Args:
        model: a model in eval mode; left as it was.
        args, kwargs: example inputs of its forward.
        journal: gets what was tried.

    Returns:
        The proven regions and the refused candidates, each with its reason.
    """
    with torch.no_grad():
        return _discover(model, args, kwargs, journal or Journal())


def _discover(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], journal: Journal) -> Discovery:
    if has_no_data(model):
        return discover_on_meta(model, args, kwargs, discover)
    places = matching(model)
    with journal.stage("candidates"):
        candidates = journal.candidates = left_to_discovery(find_candidates(model), places)
    with recorded(model, places) as recording:
        with journal.stage("probe"):
            run = journal.run = probe(model, candidates, args, kwargs)
        found = prove(model, candidates, run, journal)
        if places and len(recording.runs) == 1:
            run_again(model, run, ())
    if places:
        found = with_entries(model, places, recording, run.why_no_large, found, journal)
    journal.found = Discovery(regions=tuple(found[0]), refused=tuple(found[1]))
    return journal.found
