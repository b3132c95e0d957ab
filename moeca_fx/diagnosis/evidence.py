"""What is known of every candidate: its experts, its router, the proofs that were tried, the nearest miss.

blocks.1.mlp.experts.blocks: 4 experts, children of one type, Expert (gate_proj.weight 8x16, ..), 24 calls in the probe
  router   top-k in blocks.1.mlp.gate
  method   blocks.1.mlp.experts.forward: proven, error 1.2e-07: rows: x, ids: ids, weights: w
"""

from dataclasses import dataclass

from torch import Tensor, nn

from moeca_fx.discover import Discovery, MoERegion, Refusal
from moeca_fx.discover.candidates import Candidate
from moeca_fx.discover.journal import Attempt, Journal
from moeca_fx.discover.probe import Probe, enclosing_router, key_of
from moeca_fx.reasons import Reason

_SHOWN = 6


@dataclass(frozen=True)
class CandidateReport:
    """One candidate.

    Attributes:
        path: of what holds the experts; of the module for a registered entry.
        experts: their number.
        form: what they are, in words.
        router: where a top-k ran, in words.
        attempts: proofs that were tried, in order.
        proven: whether one held.
        refusal: why none did; empty when one held, or when the run stopped before.
        is_moe: whether it ran under a router, so that the model cannot be transformed without it.
        codes: the documented reasons.
    """

    path: str
    experts: int
    form: str
    router: str
    attempts: tuple[Attempt, ...]
    proven: bool
    refusal: str = ""
    is_moe: bool = False
    codes: tuple[Reason, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.path or '(the model)'}: {self.form}", f"  router   {self.router}"]
        for attempt in self.attempts:
            outcome = attempt.problem or f"proven, error {attempt.error:.1e}: {attempt.found}"
            lines.append(f"  {attempt.kind:<9}{attempt.place}: {outcome}")
            if attempt.nearest is not None:
                lines.append(f"  nearest  {attempt.nearest}")
        if self.refusal:
            tried = any(attempt.problem in self.refusal for attempt in self.attempts)
            lines.append(f"  {'refused' if self.is_moe else 'left':<9}{'as above' if tried else self.refusal}")
        for code in self.codes:
            lines.append(f"  {code}: {code.meaning}; to do: {code.advice}")
        return "\n".join(lines)


def candidate_reports(model: nn.Module, journal: Journal, found: Discovery | None) -> tuple[CandidateReport, ...]:
    """A report of every candidate and of every entry that was tried.

    Args:
        model: that discovery ran on.
        journal: of the discovery.
        found: what it found; None when it raised.
    """
    regions = found.regions if found is not None else ()
    refused = {refusal.path: refusal for refusal in found.refused} if found is not None else {}
    reports = [_of_candidate(model, each, journal, regions, refused.get(each.path)) for each in journal.candidates]
    entries = {attempt.candidate: attempt for attempt in journal.attempts if attempt.kind == "entry"}
    for path, attempt in entries.items():
        region = next((region for region in regions if region.path == path), None)
        refusal = refused.get(path)
        reports.append(
            CandidateReport(
                path=path,
                experts=region.num_experts if region is not None else 0,
                form=f"a {type(model.get_submodule(path)).__name__} that a registered entry matches",
                router="as the entry says",
                attempts=(attempt,),
                proven=region is not None,
                refusal=refusal.reason if refusal is not None else "",
                is_moe=refusal is not None and refusal.is_moe,
                codes=refusal.codes if refusal is not None else (),
            )
        )
    return tuple(reports)


def _of_candidate(
    model: nn.Module,
    candidate: Candidate,
    journal: Journal,
    regions: tuple[MoERegion, ...],
    refusal: Refusal | None,
) -> CandidateReport:
    attempts = tuple(each for each in journal.attempts if each.candidate == candidate.path and each.kind != "entry")
    return CandidateReport(
        path=candidate.path,
        experts=candidate.count,
        form=_form(model, candidate, journal.run),
        router=_router(candidate, journal.run),
        attempts=attempts,
        proven=any(region.container == candidate.path and region.entry is None for region in regions),
        refusal=refusal.reason if refusal is not None else "",
        is_moe=refusal is not None and refusal.is_moe,
        codes=refusal.codes if refusal is not None else (),
    )


def _form(model: nn.Module, candidate: Candidate, run: Probe | None) -> str:
    if candidate.stacked:
        own = model.get_submodule(candidate.path).named_parameters(recurse=False)
        return f"{candidate.stacked} experts, stacked in {_shapes(dict(own))}"
    where = "attributes" if candidate.attributes else "children"
    full = next(module for _, module in candidate.experts if next(module.parameters(), None) is not None)
    calls = "" if run is None else f", {run.experts[key_of(candidate)].count} calls in the probe"
    kind = f"{type(full).__name__} ({_shapes(dict(full.named_parameters()))})"
    return f"{candidate.count} experts, {where} of one type, {kind}{calls}"


def _shapes(tensors: dict[str, Tensor]) -> str:
    named = [f"{name} {'x'.join(str(size) for size in value.shape)}" for name, value in tensors.items()]
    return ", ".join(named[:_SHOWN]) + (", .." if len(named) > _SHOWN else "")


def _router(candidate: Candidate, run: Probe | None) -> str:
    if run is None:
        return "not looked for: the probe did not run"
    block = enclosing_router(candidate.path, run.topk)
    if block is None:
        return "none: no top-k ran in a module around them"
    inside = dict.fromkeys(stack[-1] for stack in run.topk if block in stack)
    return f"top-k in {', '.join(list(inside)[:_SHOWN])}, seen from {block}"
