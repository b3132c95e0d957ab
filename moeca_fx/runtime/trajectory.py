"""A trajectory: the steps of one denoising run in one named context, and when the next one begins."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from moeca_fx.graph.state import StateSpec
from moeca_fx.runtime.program import Program
from moeca_fx.runtime.timestep import Times, direction_of, jumped_back

STOOD_STILL = "the timestep did not move between the first two calls"


@dataclass
class Trajectory:
    """State of one run.

    Attributes:
        program, batch: what it runs, for how many samples; another program begins a new trajectory.
        call_batch: samples of the whole call, whose chunk these may be; another number begins a new trajectory.
        step: calls so far.
        states: cache tensors after the last call.
        counters: what the steps of each rule counted so far.
        cached_steps: how many of the calls followed a rule; routed_steps: how many of those routed branches.
        full_steps: indices of the full steps, the last one first.
        memory: what the schedule remembers.
        probed: the value that the probe's change is measured against; None before the first step.
        doubtful: whether it began because two calls had the same first timestep: two guidance calls a step look so.
        announced: whether it belongs to a session, which says when it is over.
        paired: whether the next timestep came twice as well; then every step is full, because states would mix.
    """

    program: Program
    batch: int
    call_batch: int
    step: int = 0
    states: list[Tensor] = field(default_factory=list)
    counters: dict[int, Tensor] = field(default_factory=dict)
    cached_steps: int = 0
    routed_steps: int = 0
    full_steps: list[int] = field(default_factory=list)
    memory: Any = None
    probed: Tensor | None = None
    timestep: Times | None = None
    direction: int = 0
    doubtful: bool = False
    announced: bool = False
    paired: bool = False

    def why_over(self, program: Program, batch: int, timestep: Times | None) -> str | None:
        """Why a call with these inputs, `batch` samples in all, begins a new trajectory; None when it does not.

        Without a timestep, in a session, the inputs' kinds alone decide.
        """
        if batch != self.call_batch:
            return f"the batch size changed from {self.call_batch} to {batch}"
        if program is not self.program:
            return "the shape, dtype or device of the inputs, or the autocast around them, changed"
        if timestep is None:
            return None
        assert self.timestep is not None, "a trajectory has made at least one call"
        if len(timestep) != len(self.timestep):
            return "the shape of the timestep changed"
        if self.direction and jumped_back(timestep, self.timestep, self.direction):
            return "the timestep jumped back"
        if self.step == 1 and timestep == self.timestep:
            return STOOD_STILL
        return None

    def must_be_full(self, timestep: Times | None) -> bool:
        """Whether this call may belong to another trajectory that runs through the same context.

        After two calls at the first timestep, the next call is full; if its timestep comes twice too, all are. In a
        session, which has no timesteps, never.
        """
        if timestep is None:
            return False
        if self.doubtful and self.step >= 2 and not self.paired:
            assert self.timestep is not None, "a trajectory has made two calls"
            self.paired = timestep == self.timestep
            self.doubtful = self.paired
        return self.doubtful

    def advance(self, timestep: Times | None, states: list[Tensor]) -> None:
        """Record a finished call."""
        if timestep is not None and self.timestep is not None and not self.direction:
            self.direction = direction_of(timestep, self.timestep)
        self.timestep = timestep
        self.states = states
        self.step += 1

    def count(self, rule: int, counters: Tensor | None) -> None:
        """Add the counters of a step of a rule."""
        self.cached_steps += 1
        if counters is not None:
            self.counters[rule] = self.counters[rule] + counters if rule in self.counters else counters
            assert self.program.graphs is not None
            self.routed_steps += any(counter.kind == "matched" for counter in self.program.graphs.rules[rule].counters)

    def held(self) -> list[tuple[StateSpec, Tensor]]:
        """Every cache tensor after the last call; none before the first."""
        assert self.program.graphs is not None, "a trajectory has caches"
        return list(zip(self.program.graphs.states, self.states, strict=True)) if self.states else []

    def recomputed_branches(self) -> int:
        """Branches recomputed so far; waits for the device."""
        return self._total("recomputed")

    def _total(self, kind: str) -> int:
        if self.program.graphs is None:
            return 0
        return sum(
            value
            for rule, counters in self.counters.items()
            for counter, value in zip(self.program.graphs.rules[rule].counters, counters.tolist(), strict=True)
            if counter.kind == kind
        )

    def branches(self) -> int:
        """Branches routed on its steps that route."""
        per_sample = sum(site.tokens * site.top_k for site in self.program.sites.moe)
        return per_sample * self.batch * self.routed_steps
