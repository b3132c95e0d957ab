"""What `doctor` found, and its text.

Toy
  ok       probe              0.0 s
  stopped  regions                    0 of 1 layers proven
blocks.1.mlp.experts: 4 of ModuleList, ..
  block    blocks.1.mlp.forward: expert 2 enters the sum with 1.0100 times its routing weight
Stopped at regions: ..
Reason weights-off: .. To do: ..
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from moeca_fx.diagnosis.evidence import CandidateReport
from moeca_fx.reasons import Reason

Status = Literal["ok", "stopped", "not reached"]


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: of the stage; graph passes by their own names.
        status: ``ok``, ``stopped`` (the first one that is, ends the run) or ``not reached``.
        seconds: it took.
        note: what came of it.
    """

    name: str
    status: Status
    seconds: float = 0.0
    note: str = ""

    def __str__(self) -> str:
        return f"  {self.status:<9}{self.name:<20}{self.seconds:8.2f} s  {self.note}".rstrip()


@dataclass(frozen=True)
class DoctorReport:
    """What became of a model.

    Attributes:
        model: class name.
        stages: all, in order.
        candidates: every set of modules or parameters that may be experts, with what was tried.
        error: message of what stopped it; empty when the whole model transforms.
        code: the documented reason; None when it transforms, or stopped for none of them.
    """

    model: str
    stages: tuple[Stage, ...]
    candidates: tuple[CandidateReport, ...]
    error: str = ""
    code: Reason | None = None

    @property
    def ok(self) -> bool:
        """Whether the whole model transforms."""
        return not self.error

    @property
    def stopped(self) -> str | None:
        """The stage that it stopped at."""
        return next((stage.name for stage in self.stages if stage.status == "stopped"), None)

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {**asdict(self), "ok": self.ok, "stopped": self.stopped}

    def __str__(self) -> str:
        lines = [self.model, *(str(stage) for stage in self.stages if stage.status != "not reached")]
        beyond = [stage.name for stage in self.stages if stage.status == "not reached"]
        lines += [f"  not reached: {', '.join(beyond)}"] if beyond else []
        for candidate in self.candidates:
            lines += ["", str(candidate)]
        lines.append("")
        if self.ok:
            return "\n".join([*lines, "The whole model transforms."])
        lines.append(f"Stopped at {self.stopped}: {self.error}")
        if self.code is None:
            lines.append("This is none of the documented reasons (docs/refusals.md); please report this model.")
        else:
            lines += [f"Reason {self.code}: {self.code.meaning}.", f"To do: {self.code.advice}."]
        return "\n".join(lines)
