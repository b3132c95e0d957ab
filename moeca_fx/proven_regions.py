"""The regions that a model is transformed with: discovered, and every one that ran under a router proven."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from moeca_fx.discover import Discovery, discover
from moeca_fx.discover.adapted import kind_of, of_kinds, unevenly_adapted
from moeca_fx.discover.behaviour import check_behaviour
from moeca_fx.discover.journal import Journal
from moeca_fx.discover.state import State, first_run
from moeca_fx.discover.unlike import unlike_experts
from moeca_fx.errors import NoMoEFoundError, UnprovenRegionError
from moeca_fx.model_checks import check_inputs, check_model, has_no_data
from moeca_fx.reasons import Reason


def find_regions(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], journal: Journal | None = None
) -> Discovery:
    """Check the model and its inputs, and discover; everything that ran under a router must be proven.

    Args:
        model, args, kwargs: as for `transform`.
        journal: gets what was tried.

    Raises:
        As `transform`.
    """
    check_model(model)
    return prove_regions(model, args, kwargs, journal)


def prove_regions(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], journal: Journal | None = None
) -> Discovery:
    """The same for a model whose state is known to be one that can be transformed."""
    check_inputs(model, args, kwargs)
    before = State(model)
    with first_run(model) as ran:
        found = discover(model, args, kwargs, journal)
    unproven = [refusal for refusal in found.refused if refusal.is_moe]
    if (found.regions or unproven) and not has_no_data(model):
        with (journal or Journal()).stage("behaviour"):
            check_behaviour(model, *ran[0], before)
    if unproven:
        reasons = "; ".join(f"{refusal.path}: {refusal.reason}" for refusal in unproven)
        raise UnprovenRegionError(
            f"{type(model).__name__}: a mixture-of-experts region could not be proven, nothing was changed. {reasons}",
            code=Reason.most_telling(refusal.code for refusal in unproven),
        )
    uneven = unevenly_adapted(model)
    modules = [region.experts[0] for region in found.regions if region.form is None and region.entry is None]
    kinds = {kind_of(model.get_submodule(path)) for path in modules}
    if left := of_kinds(uneven, kinds):
        raise UnprovenRegionError(
            f"{type(model).__name__}: experts of a layer differ: {'; '.join(map(str, left))}", code=Reason.ADAPTERS
        )
    if not found.regions:
        seen = [
            *map(str, uneven),
            *(f"{refusal.path}: {refusal.reason}" for refusal in found.refused),
            *unlike_experts(model),
        ]
        looked = "; ".join(seen) or "no candidates"
        raise NoMoEFoundError(
            f"{type(model).__name__}: found no mixture-of-experts layer (expected a list of identical experts under a "
            f"top-k router). Looked at: {looked}. " + ("" if uneven else "For a dense model use another cache"),
            code=Reason.NO_EXPERTS,
        )
    return found
