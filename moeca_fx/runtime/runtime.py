"""The runtime behind a transformed model: programs, contexts, steps, statistics."""

import logging
import math
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from moeca_fx.discover import MoERegion
from moeca_fx.errors import UnsupportedModelError
from moeca_fx.model_checks import check_autocast
from moeca_fx.passes.insert_cache import detached_copy
from moeca_fx.policies.policy import Policy
from moeca_fx.policies.schedule import FULL, Cycle
from moeca_fx.runtime.accounting import Accounting
from moeca_fx.runtime.memory import MemoryReport, report
from moeca_fx.runtime.program import Program, Signature, build_program, check_finite, finish_program, signature_of
from moeca_fx.runtime.statistics import Statistics
from moeca_fx.runtime.timestep import timestep_value
from moeca_fx.runtime.trajectory import STOOD_STILL, Trajectory

log = logging.getLogger(__name__)
DEFAULT_CONTEXT = "default"
_MANY_PROGRAMS = 8


class NothingReusedWarning(UserWarning):
    """A run in which no branch was reused: it cost as much as the uncached model."""


class OtherLengthWarning(UserWarning):
    """A trajectory of another length than the policy was made for."""


def _levels_to_the_caller() -> int:
    """`stacklevel` of the first frame outside this package and torch, for a warning raised by the caller of this."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith(("moeca_fx.", "torch.")):
        level, frame = level + 1, frame.f_back
    return level


class Runtime:
    """Runs the graphs of one transformed model and keeps its trajectories.

    Args:
        regions: proven MoE regions.
        policy: None runs the vectorised graph at every step.
        timestep: parameter name or position of the timestep; None finds it.
        compile: whether graphs run through torch.compile where a compiler exists.
    """

    def __init__(
        self,
        regions: tuple[MoERegion, ...],
        policy: Policy | None,
        timestep: str | int | None,
        compile: bool = False,
    ) -> None:
        self.regions = regions
        self.policy = policy
        self.timestep = timestep
        self.compile = compile
        self.programs: dict[Signature, Program] = {}
        self.trajectories: dict[str, Trajectory] = {}
        self._active: ContextVar[str] = ContextVar("moeca_fx_context", default=DEFAULT_CONTEXT)
        self._warned: set[str] = set()
        self.reset_stats()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Runtime":
        """A copied model starts without programs, trajectories and statistics; they are rebuilt on its first call."""
        return Runtime(self.regions, self.policy, self.timestep, self.compile)

    def under(self, policy: Policy | None, compile: bool | None = None) -> "Runtime":
        """A runtime of the same traced graphs under another policy, without trajectories and statistics."""
        other = Runtime(self.regions, policy, self.timestep, self.compile if compile is None else compile)
        for signature, program in self.programs.items():
            own = replace(program.traced, module=detached_copy(program.traced_module))
            other.programs[signature] = finish_program(own, policy, self.timestep, other.compile)
        return other

    # -- calls --------------------------------------------------------------------------------------------------

    def prepare(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Program:
        """The program for such a call, compiled when it is the first of its kind."""
        return self._program(model, args, kwargs, signature_of(args, kwargs)[0])

    def _program(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], signature: Signature
    ) -> Program:
        if signature not in self.programs:
            if len(self.programs) == _MANY_PROGRAMS:
                log.warning(
                    "%s was compiled for %d kinds of inputs; a Python number that changes at every call is the usual "
                    "cause: pass it as a tensor",
                    type(model).__name__,
                    _MANY_PROGRAMS,
                )
            plain_args, plain_kwargs = _detached(args), _detached(dict(kwargs))
            self.programs[signature] = build_program(
                original_view(model), self.regions, plain_args, plain_kwargs, self.policy, self.timestep, self.compile
            )
        return self.programs[signature]

    def call(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """One forward call of the transformed model."""
        if model.training:
            raise UnsupportedModelError(
                f"{type(model).__name__} is in training mode; caching is for inference: call .eval() first"
            )
        check_autocast()
        # Caches outlive the call, so they must not become inference tensors, which cannot be written to outside.
        with torch.inference_mode(False), torch.no_grad():
            signature, leaves, batch = signature_of(args, kwargs)
            program = self._program(model, args, kwargs, signature)
            if program.graphs is None:
                tally = self.accounting.tally(program, leaves, batch)
                tally.full_steps += 1
                return program.split(program.run("", batch, *leaves))[0]
            return self._step(program, leaves, batch)

    def _step(self, program: Program, leaves: list[Any], batch: int) -> Any:
        assert program.graphs is not None and program.timestep is not None and self.policy is not None
        name = self._active.get()
        try:
            check_finite(leaves)
            timestep = timestep_value(leaves[program.timestep])
            trajectory = self._continue_or_begin(name, program, batch, timestep)
            tally = self.accounting.tally(program, leaves, batch)
            if trajectory.step == self.policy.schedule.settles:
                self._warn_if_nothing_reused(trajectory, "")
            device = leaves[program.timestep].device
            probed, change, prefix = self._probe(program, trajectory, leaves)
            rule = self._choose(trajectory, timestep, change)
            step = program.graphs.full_step if rule == FULL else program.graphs.rules[rule]
            if rule == FULL:
                held = self._carried(program, trajectory, batch, device)
                trajectory.states = []  # what a full step does not read makes room for what it writes
            else:
                held = trajectory.states
            clock = [self._clock(trajectory, rule, device)] if step.clock else []
            result, rest = program.split(
                program.run(step.name, batch, *leaves, *held, *clock, *(prefix if step.prefix else []))
            )
            states, counters = rest[: len(program.graphs.states)], rest[len(program.graphs.states) :]
            if rule == FULL:
                tally.full_steps += 1
                trajectory.full_steps.insert(0, trajectory.step)
            else:
                counted = counters[0] if counters else None
                trajectory.count(rule, counted)
                tally.count_cached(rule, counted)
            if program.graphs.probe is not None and (rule == FULL or program.graphs.probe.every_step):
                trajectory.probed = probed
            trajectory.advance(timestep, states)
        except BaseException:
            # A step that stopped halfway has written some caches and not others.
            self.trajectories.pop(name, None)
            raise
        return result

    def _probe(
        self, program: Program, trajectory: Trajectory, leaves: list[Any]
    ) -> tuple[Tensor | None, float, list[Tensor]]:
        """The probe's value, its change (NaN where there is nothing to compare), and the stream to continue from."""
        assert program.graphs is not None and program.timestep is not None
        probe = program.graphs.probe
        if probe is None:
            return None, math.nan, []
        before = trajectory.probed
        if before is None:
            device = leaves[program.timestep].device
            before = torch.zeros(trajectory.batch, *probe.state.shape, dtype=probe.state.dtype, device=device)
        change, value, *prefix = program.run("probe", trajectory.batch, *leaves, before)
        # A probed value may be a view of the caller's tensors.
        return value.clone(), math.nan if trajectory.probed is None else float(change), prefix

    def _choose(self, trajectory: Trajectory, timestep: Tensor, change: float) -> int:
        """`FULL` or the position of a rule."""
        assert self.policy is not None
        self._warn_if_other_length(trajectory, over=False)
        chosen, trajectory.memory = self.policy.schedule.choose(trajectory.step, change, trajectory.memory)
        must = trajectory.must_be_full(timestep) or not trajectory.full_steps
        return FULL if must else chosen

    def _clock(self, trajectory: Trajectory, rule: int, device: torch.device) -> Tensor:
        """The numbers of this step; a full step that measures forecasts reads those of the first rule."""
        assert self.policy is not None
        step, full = trajectory.step, trajectory.full_steps
        numbers = self.policy.rules[max(rule, 0)].clock(step, full or [step - 1])
        return torch.tensor(numbers, dtype=torch.float32, device=device)

    def _carried(self, program: Program, trajectory: Trajectory, batch: int, device: torch.device) -> list[Tensor]:
        assert program.graphs is not None
        if trajectory.states:
            pairs = zip(program.graphs.states, trajectory.states, strict=True)
            return [tensor for state, tensor in pairs if state.carried]
        carried = [state for state in program.graphs.states if state.carried]
        return [torch.full((batch, *state.shape), state.empty, dtype=state.dtype, device=device) for state in carried]

    def _continue_or_begin(self, name: str, program: Program, batch: int, timestep: Tensor) -> Trajectory:
        current, reason = self.trajectories.get(name), ""
        if current is not None:
            reason = current.why_over(program, batch, timestep) or ""
            if not reason:
                return current
            self._warn_if_nothing_reused(current, reason)
            self._warn_if_other_length(current, over=True)
        self.trajectories[name] = Trajectory(program, batch, doubtful=reason == STOOD_STILL)
        self.accounting.trajectories += 1
        return self.trajectories[name]

    # -- contexts -----------------------------------------------------------------------------------------------

    @contextmanager
    def context(self, name: str) -> Iterator[None]:
        """Calls inside the block belong to the trajectory `name`."""
        token = self._active.set(name)
        try:
            yield
        finally:
            self._active.reset(token)

    def reset(self, name: str | None = None) -> None:
        """End the trajectory of one context, or of all; the next call is a full step and caches are freed."""
        for key in [name] if name is not None else list(self.trajectories):
            if (trajectory := self.trajectories.pop(key, None)) is not None:
                self._warn_if_nothing_reused(trajectory, "reset() was called")

    def forget_programs(self) -> None:
        """Drop graphs and caches: the weights moved or changed their type."""
        self.trajectories.clear()
        self.programs.clear()
        self.reset_stats()

    def _warn_if_nothing_reused(self, trajectory: Trajectory, reason: str) -> None:
        """Say once when a finished trajectory reused nothing."""
        why = self._why_nothing_reused(trajectory, reason)
        if why is not None and "nothing reused" not in self._warned:
            self._warned.add("nothing reused")
            message = f"moeca_fx: a run of {trajectory.step} steps reused nothing: {why}"
            warnings.warn(message, NothingReusedWarning, _levels_to_the_caller())

    def _warn_if_other_length(self, trajectory: Trajectory, over: bool) -> None:
        """Say once when a schedule was made for trajectories of another length."""
        assert self.policy is not None
        length = self.policy.schedule.length
        if length is None or trajectory.step < 2 or "length" in self._warned:
            return
        if trajectory.step < length if over else trajectory.step == length:
            self._warned.add("length")
            found = f"ended after {trajectory.step}" if over else f"goes on after {length}"
            warnings.warn(
                f"moeca_fx: the policy was made for trajectories of {length} steps, this one {found}; its full steps "
                "fall elsewhere than intended: run that many, or tune a policy for yours",
                OtherLengthWarning,
                _levels_to_the_caller(),
            )

    def _why_nothing_reused(self, trajectory: Trajectory, reason: str) -> str | None:
        assert self.policy is not None
        if trajectory.cached_steps == 0:
            schedule = self.policy.schedule
            if isinstance(schedule, Cycle) and schedule.interval == 1:
                return "interval=1 makes every step full"
            advice = (
                "; if the sampler calls the model twice a step (guidance), wrap each call in "
                "`with model.context('cond'):` and `with model.context('uncond'):`, else every step runs in full"
            )
            if trajectory.paired:
                return f"every timestep came twice in one context{advice}"
            if 1 < trajectory.step <= schedule.settles:
                return f"it was over before {schedule} skips a step"
            if trajectory.step > 1:
                return f"the schedule {schedule} made every step full; lower its threshold's caution or choose another"
            return f"it had one call before a new trajectory began, because {reason}" + advice * (reason == STOOD_STILL)
        if trajectory.routed_steps and trajectory.branches() == trajectory.recomputed_branches():
            steps = trajectory.routed_steps
            return f"every branch was recomputed on all {steps} cached steps; raise tau0 or lower lambda1"
        return None

    # -- reports ------------------------------------------------------------------------------------------------

    def reset_stats(self) -> None:
        """Start counting anew; trajectories go on."""
        self.accounting = Accounting()

    def stats(self) -> Statistics:
        """Totals so far; waits for the device, and measures FLOPs once for each program and batch size."""
        if self.policy is not None:
            for trajectory in self.trajectories.values():
                if trajectory.cached_steps or trajectory.step > self.policy.schedule.settles:
                    self._warn_if_nothing_reused(trajectory, "stats() was called")
        return self.accounting.statistics()

    def memory(self) -> MemoryReport:
        """Bytes that caches hold now, all contexts together."""
        held = []
        batch = 0
        for trajectory in self.trajectories.values():
            assert trajectory.program.graphs is not None
            batch += trajectory.batch
            for state, tensor in zip(trajectory.program.graphs.states, trajectory.states, strict=True):
                held.append((state, tensor.numel() * tensor.element_size()))
            if trajectory.probed is not None and trajectory.program.graphs.probe is not None:
                probed = trajectory.probed
                held.append((trajectory.program.graphs.probe.state, probed.numel() * probed.element_size()))
        return report(held, batch)

    def cache(self, name: str) -> dict[str, Tensor]:
        """The cache tensors of a context by state name; empty before its first step."""
        trajectory = self.trajectories.get(name)
        if trajectory is None or trajectory.program.graphs is None:
            return {}
        return {s.name: t for s, t in zip(trajectory.program.graphs.states, trajectory.states, strict=True)}


def original_view(model: nn.Module) -> nn.Module:
    """The same modules and weights under the original class, whose forward is the one to trace."""
    _transformed, _mixin, original = type(model).__mro__[:3]
    view: nn.Module = object.__new__(original)
    object.__setattr__(view, "__dict__", model.__dict__)
    return view


def _detached(value: Any) -> Any:
    """Inputs as ordinary tensors: inference tensors cannot be traced."""
    return pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, value)
