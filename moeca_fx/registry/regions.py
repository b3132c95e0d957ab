"""Regions by entries: where automatic proof failed, or found nothing, or is not wanted (`prefer`).

a module that an entry matches     automatic proof of experts inside      the entry
  ordinary                           tried first                            used when there is none
  prefer=True                        not tried                              used
"""

from collections.abc import Mapping, Sequence
from functools import partial

from torch import nn

from moeca_fx.discover.candidates import Candidate
from moeca_fx.discover.inline.nearest import Nearest
from moeca_fx.discover.inline.tape import NotReplayable
from moeca_fx.discover.journal import Journal
from moeca_fx.discover.records import MoERegion, Refusal
from moeca_fx.reasons import Reason
from moeca_fx.registry.calls import Recording
from moeca_fx.registry.entry import Entry
from moeca_fx.registry.proof import prove_entry


def left_to_discovery(candidates: Sequence[Candidate], places: Mapping[str, Entry]) -> list[Candidate]:
    """Candidates outside of the modules of preferred entries."""
    taken = [path for path, entry in places.items() if entry.prefer]
    return [candidate for candidate in candidates if not any(_within(candidate.path, path) for path in taken)]


def with_entries(
    model: nn.Module,
    places: Mapping[str, Entry],
    recording: Recording,
    why_no_large: str,
    found: tuple[list[MoERegion], list[Refusal]],
    journal: Journal,
) -> tuple[list[MoERegion], list[Refusal]]:
    """What discovery found, with the regions of entries, in module order.

    Args:
        model: in eval mode.
        places: module path -> entry.
        recording: of both runs.
        why_no_large: why there is no second run on more samples; empty when there is.
        found: regions and refusals.
        journal: gets every attempt.
    """
    regions, refused = list(found[0]), list(found[1])
    for path, entry in places.items():
        if any(_within(region.path, path) or _within(path, region.path) for region in found[0]):
            continue
        proof = partial(_proof, model, path, entry, recording, why_no_large)
        try:
            regions.append(journal.attempt(path, "entry", f"{path}.{entry.region}", proof))
        except NotReplayable as reason:
            before = [refusal for refusal in refused if _within(refusal.path, path)]
            called = reason.code is not Reason.EXPERTS_DID_NOT_RUN
            said = "; ".join([str(reason), *(refusal.reason for refusal in before)])
            codes = dict.fromkeys([reason.code, *(code for refusal in before for code in refusal.codes)])
            refused = [refusal for refusal in refused if refusal not in before]
            refused.append(Refusal(path, said, called, tuple(codes)))
        else:
            refused = [refusal for refusal in refused if not _within(refusal.path, path)]
    order = {path: index for index, (path, _) in enumerate(model.named_modules())}
    return (
        sorted(regions, key=lambda region: order[region.path]),
        sorted(refused, key=lambda refusal: order[refusal.path]),
    )


def _proof(
    model: nn.Module, path: str, entry: Entry, recording: Recording, why_no_large: str, _nearest: Nearest | None
) -> tuple[MoERegion, str]:
    if not callable(getattr(model.get_submodule(path), entry.region, None)):
        kind = type(model.get_submodule(path)).__name__
        problem = f"entry {entry.name!r}: region: expected a method of {kind}, found no {entry.region!r}"
        raise NotReplayable(problem, Reason.ENTRY_FAILED)
    if why_no_large:
        raise NotReplayable(why_no_large, Reason.ONE_BATCH_SIZE)
    first, last = recording.runs[0][path], recording.runs[-1][path]
    if not first or not last:
        problem = f"entry {entry.name!r}: {path}.{entry.region} is not called on the example inputs"
        raise NotReplayable(problem, Reason.EXPERTS_DID_NOT_RUN)
    if len(first) != 1 or len(last) != 1:
        problem = f"called {len(first)} times in one forward; exactly one call is supported"
        raise NotReplayable(problem, Reason.CALLED_AGAIN)
    region = prove_entry(model, path, entry, first[0], last[0])
    return region, f"entry {entry.name!r}: its route, experts and finish"


def _within(path: str, other: str) -> bool:
    """Whether `path` is at or below `other`."""
    return path == other or other == "" or path.startswith(f"{other}.")
