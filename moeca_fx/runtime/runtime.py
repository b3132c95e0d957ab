"""The runtime behind a transformed model: programs, contexts, steps, statistics."""

import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from moeca_fx.autocast import Autocast
from moeca_fx.discover import MoERegion
from moeca_fx.errors import ConfigError, InputError, UnprovenRegionError, UnsupportedModelError
from moeca_fx.inputs import no_modes, ordinary_leaf
from moeca_fx.offloading import whole_model_hook, without_hook
from moeca_fx.passes.insert_cache import detached_copy
from moeca_fx.policies.policy import Policy
from moeca_fx.policies.schedule import FULL
from moeca_fx.proven_regions import prove_regions
from moeca_fx.reasons import Reason
from moeca_fx.runtime.accounting import Accounting, Tally
from moeca_fx.runtime.advice import Advice
from moeca_fx.runtime.chunks import Chunk, join, split_batch
from moeca_fx.runtime.memory import MemoryReport, report
from moeca_fx.runtime.options import MemoryOptions
from moeca_fx.runtime.program import Program, build_program, check_finite, finish_program
from moeca_fx.runtime.sample_axes import Axes, cut, find_axes
from moeca_fx.runtime.session import Ended, Session
from moeca_fx.runtime.shortage import is_out_of_memory, out_of_memory
from moeca_fx.runtime.signature import Signature, Signatures
from moeca_fx.runtime.statistics import Statistics
from moeca_fx.runtime.timestep import ANNOUNCED, Announced, Times, timestep_value
from moeca_fx.runtime.trajectory import STOOD_STILL, Trajectory

log = logging.getLogger(__name__)
DEFAULT_CONTEXT = "default"
Key = str | tuple[str, int]
_MANY_PROGRAMS = 8


class Runtime:
    """Runs the graphs of one transformed model and keeps its trajectories.

    Args:
        regions: MoE regions that are proven under the autocast of now.
        policy: None runs the vectorised graph at every step.
        timestep: parameter name or position of the timestep; None finds it, `ANNOUNCED` needs none.
        options: how much memory it may use.

    Attributes:
        programs: by `signature_of`; those for one batch size by (signature, batch size).
        fixed: signatures whose batch size the model's own code fixes, and why.
        trajectories: by context; those of chunks after the first by (context, number of the chunk).
    """

    def __init__(
        self,
        regions: tuple[MoERegion, ...],
        policy: Policy | None,
        timestep: str | int | Announced | None,
        options: MemoryOptions,
        compile: bool = False,
    ) -> None:
        self.regions = regions
        self._proven = {Autocast.now(): regions}
        self.policy = policy
        self.timestep = timestep
        self.options = options
        self.compile = compile
        self.programs: dict[tuple[Any, ...], Program] = {}
        self.fixed: dict[Signature, str] = {}
        self._axes: dict[tuple[Any, ...], Axes] = {}
        self._signatures = Signatures()
        self.trajectories: dict[Key, Trajectory] = {}
        self._active: ContextVar[str] = ContextVar("moeca_fx_context", default=DEFAULT_CONTEXT)
        self._session: ContextVar[Session | None] = ContextVar("moeca_fx_session", default=None)
        self._numbers = itertools.count(1)
        self.advice = Advice(policy)
        self.reset_stats()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Runtime":
        """A copied model starts without programs, trajectories and statistics; they are rebuilt on its first call."""
        return self._alike(self.policy, self.compile)

    def _alike(self, policy: Policy | None, compile: bool) -> "Runtime":
        other = Runtime(self.regions, policy, self.timestep, self.options, compile)
        other._proven = dict(self._proven)
        return other

    def under(self, policy: Policy | None, compile: bool | None = None) -> "Runtime":
        """A runtime of the same traced graphs under another policy, without trajectories and statistics."""
        chosen = self.compile if compile is None else compile
        other = self._alike(policy, chosen)
        other.fixed = dict(self.fixed)
        for key, program in self.programs.items():
            own = replace(program.traced, module=detached_copy(program.traced_module))
            other._add(key, finish_program(own, policy, self.timestep, chosen))
        return other

    # -- calls --------------------------------------------------------------------------------------------------

    def prepare(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Program:
        """The program for such a call, compiled when it is the first of its kind."""
        signature, leaves, batch = self._signatures.of(args, kwargs)
        return self._program_of(model, signature, leaves, batch, self._first_chunk(batch))

    def _first_chunk(self, batch: int) -> Chunk:
        """What is computed at once at the beginning of a call, as far as the options say."""
        return Chunk(0, min(batch, self.options.chunk or batch))

    def _program_of(
        self, model: nn.Module, signature: Signature, leaves: list[Any], batch: int, chunk: Chunk
    ) -> Program:
        """The program for a chunk of a call; that of the whole call unless the model's code fixes the batch size."""
        known = self.programs.get(self._key_of(signature, chunk.size))
        if known is not None:
            return known
        args, kwargs = pytree.tree_unflatten(self._taken(model, signature, leaves, batch, chunk), signature[0])
        return self._program(model, args, kwargs, signature, chunk.size)

    def _taken(self, model: nn.Module, signature: Signature, leaves: list[Any], batch: int, chunk: Chunk) -> list[Any]:
        """A chunk's flat inputs."""
        if chunk.size == batch:
            return leaves
        key = (*signature, batch)
        if key not in self._axes:
            with _autocast_of(signature).around():
                self._axes[key] = find_axes(original_view(model), leaves, signature[0], batch)
        return cut(leaves, self._axes[key], chunk.start, chunk.size)

    def _program(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], signature: Signature, batch: int
    ) -> Program:
        if len({kind[:2] for kind in self.programs}) == _MANY_PROGRAMS:
            log.warning(
                "%s was compiled for %d kinds of inputs; a Python number that changes at every call is the usual "
                "cause: pass it as a tensor",
                type(model).__name__,
                _MANY_PROGRAMS,
            )
        plain_args, plain_kwargs = _detached(args), _detached(dict(kwargs))
        view, storage, fixed = original_view(model), self.options.storage, self.fixed.get(signature)
        with _autocast_of(signature).around():
            regions = self._regions_of(view, plain_args, plain_kwargs)
            program = build_program(
                view, regions, plain_args, plain_kwargs, self.policy, self.timestep, storage, self.compile, fixed
            )
        if program.why_fixed is not None:
            self.fixed.setdefault(signature, program.why_fixed)
        self._add(self._key_of(signature, batch), program)
        return program

    def _regions_of(self, view: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[MoERegion, ...]:
        """The regions as they are proven under the autocast of now: other dtypes are another proof.

        Raises:
            UnprovenRegionError: they hold other experts than those whose weights were stacked.
        """
        now = Autocast.now()
        if now not in self._proven:
            found = prove_regions(view, args, kwargs).regions
            if [region.experts for region in found] != [region.experts for region in self.regions]:
                known = ", ".join(str(state) for state in self._proven)
                raise UnprovenRegionError(
                    f"{type(view).__name__}: called under autocast {now}, where {_layers(found)} hold experts; "
                    f"transformed under autocast {known}, where {_layers(self.regions)} do; call transform under the "
                    "autocast of the calls",
                    code=Reason.AUTOCAST,
                )
            self._proven[now] = found
        return self._proven[now]

    def _key_of(self, signature: Signature, batch: int) -> tuple[Any, ...]:
        """Under which a call's program is kept."""
        return (*signature, batch) if signature in self.fixed else signature

    def _add(self, key: tuple[Any, ...], program: Program) -> None:
        self._most_cached(program)
        self.programs[key] = program

    def _most_cached(self, program: Program) -> float:
        """How many samples of a call may have caches.

        Raises:
            ConfigError: not one.
        """
        if self.options.limit is None or program.graphs is None:
            return math.inf
        each = program.cache_bytes(1)
        if self.options.limit >= each:
            return self.options.limit // each
        raise ConfigError(
            f"cache_limit: expected at least {each} bytes, the cache of one sample, found {self.options.limit}; raise "
            "it, store the cache in fewer bits (cache_dtype), or use policy=None"
        )

    def call(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """One forward call of the transformed model."""
        if model.training:
            raise UnsupportedModelError(
                f"{type(model).__name__} is in training mode; caching is for inference: call .eval() first"
            )
        name = self._context_of(args, kwargs)
        signature, found, batch = self._signatures.of(args, kwargs)
        # Caches outlive the call, so they must not become inference tensors, which cannot be written to outside.
        with no_modes(_autocast_of(signature)):
            leaves = [ordinary_leaf(leaf) for leaf in found]
            program = self._program_of(model, signature, leaves, batch, self._first_chunk(batch))
            try:
                return self._run(model, signature, program, leaves, batch, name)
            except BaseException as error:
                refused = None
                if is_out_of_memory(error):
                    refused = out_of_memory(error, self.memory(), program.cache_bytes(batch), batch)
                # A step that stopped halfway has written some caches and not others.
                for key in self._keys(name):
                    del self.trajectories[key]
                if refused is None:
                    raise
        # Outside of the handler: the failed step's frames, and the memory they hold, must not hang on the error.
        raise refused

    def _context_of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        """The context that a call belongs to: the one that is entered, in a session the call's own."""
        name, session = self._active.get(), self._session.get()
        if session is not None:
            return session.key(name, pytree.tree_leaves((args, dict(kwargs))))
        if self.timestep is ANNOUNCED:
            raise InputError(
                "called outside of a session: the model was transformed with timestep=ANNOUNCED, so timesteps tell "
                "nothing; wrap the run in `with model.session() as session:`, with session.next_step() after each step"
            )
        return name

    def _run(
        self, model: nn.Module, signature: Signature, program: Program, leaves: list[Any], batch: int, name: str
    ) -> Any:
        """One call, in as many chunks as the options ask for."""
        chunks = self._chunks(program, batch, name)
        results, reuses = [], False
        for number, chunk in enumerate(chunks):
            own = self._taken(model, signature, leaves, batch, chunk)
            runs = self._program_of(model, signature, leaves, batch, chunk) if signature in self.fixed else program
            tally = self.accounting.tally(runs, own, chunk.size)
            if runs.graphs is None or not chunk.cached:
                result, _ = runs.split(runs.run("", chunk.size, *own))
                tally.plain_steps += 1
            else:
                result, rule = self._step(runs, own, chunk.size, batch, _key(name, number), tally)
                reuses = reuses or rule != FULL
            results.append(result)
        self.accounting.count_call(reuses, sum(chunk.size for chunk in chunks if not chunk.cached))
        if len(results) == 1:
            return results[0]
        return join(results, program.traced_module, program.batch)

    def _chunks(self, program: Program, batch: int, name: str) -> tuple[Chunk, ...]:
        """How a call is split; trajectories of chunks that it does not have are over."""
        most = int(min(batch, self._most_cached(program)))
        if most < batch:
            self.advice.cache_limit(batch, most, program.cache_bytes(batch))
        chunks = split_batch(batch, most, self.options.chunk)
        cached = {_key(name, number) for number, chunk in enumerate(chunks) if chunk.cached}
        for key in [key for key in self._keys(name) if key not in cached]:
            del self.trajectories[key]
        return chunks

    def _keys(self, name: str) -> list[Key]:
        """Of the trajectories of a context."""
        return [key for key in self.trajectories if key == name or key[0] == name]

    def _step(
        self, program: Program, leaves: list[Any], batch: int, call_batch: int, key: Key, tally: Tally
    ) -> tuple[Any, int]:
        """A chunk's result, and `FULL` or the position of the rule it followed."""
        assert program.graphs is not None and self.policy is not None
        check_finite(leaves)
        session, device = self._session.get(), program.device(leaves)
        timestep = None if session is not None else timestep_value(leaves[program.timestep_index])
        trajectory = self._continue_or_begin(key, program, batch, call_batch, timestep, session)
        if trajectory.step == self.policy.schedule.settles and session is None:
            self.advice.nothing_reused(trajectory, "")
        probed, change, prefix = self._probe(program, trajectory, leaves, device)
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
        counted = counters[0] if counters else None
        if rule == FULL:
            tally.count_full(counted)
            trajectory.full_steps.insert(0, trajectory.step)
        else:
            trajectory.count(rule, counted)
            tally.count_cached(rule, counted)
        if program.graphs.probe is not None and (rule == FULL or program.graphs.probe.every_step):
            trajectory.probed = probed
        trajectory.advance(timestep, states)
        return result, rule

    def _probe(
        self, program: Program, trajectory: Trajectory, leaves: list[Any], device: torch.device
    ) -> tuple[Tensor | None, float, list[Tensor]]:
        """The probe's value, its change (NaN where there is nothing to compare), and the stream to continue from."""
        assert program.graphs is not None
        probe = program.graphs.probe
        if probe is None:
            return None, math.nan, []
        before = trajectory.probed
        if before is None:
            before = torch.zeros(trajectory.batch, *probe.state.shape, dtype=probe.state.dtype, device=device)
        change, value, *prefix = program.run("probe", trajectory.batch, *leaves, before)
        # A probed value may be a view of the caller's tensors.
        return value.clone(), math.nan if trajectory.probed is None else float(change), prefix

    def _choose(self, trajectory: Trajectory, timestep: Times | None, change: float) -> int:
        """`FULL` or the position of a rule."""
        assert self.policy is not None
        self.advice.other_length(trajectory.step, over=False)
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
            return [tensor for state, tensor in trajectory.held() if state.carried]
        carried = [state for state in program.graphs.states if state.carried]
        return [torch.full((batch, *state.shape), state.empty, dtype=state.dtype, device=device) for state in carried]

    def _continue_or_begin(
        self,
        key: Key,
        program: Program,
        batch: int,
        call_batch: int,
        timestep: Times | None,
        session: Session | None,
    ) -> Trajectory:
        current, reason = self.trajectories.get(key), ""
        if current is not None:
            reason = current.why_over(program, call_batch, timestep) or ""
            if not reason:
                return current
            if session is not None:
                session.ended.append(Ended(current.step, self.advice.why_nothing_reused(current, reason)))
            else:
                self.advice.nothing_reused(current, reason)
                self.advice.other_length(current.step, over=True)
        self.trajectories[key] = Trajectory(
            program, batch, call_batch, doubtful=reason == STOOD_STILL, announced=session is not None
        )
        self.accounting.trajectories += isinstance(key, str)
        return self.trajectories[key]

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
        for key in self._keys(name) if name is not None else list(self.trajectories):
            self.advice.nothing_reused(self.trajectories.pop(key), "reset() was called")

    def open_session(self) -> Session:
        """A run whose steps are announced; `within` makes calls belong to it, `close` ends it."""
        return Session(next(self._numbers), self._end)

    def _end(self, contexts: Iterable[str], reason: str) -> list[Ended]:
        """End the trajectories of a session's contexts, and tell what they were."""
        over = [(key, self.trajectories.pop(key)) for name in contexts for key in self._keys(name)]
        first = [trajectory for key, trajectory in over if isinstance(key, str)]  # a call in chunks is one
        return [Ended(item.step, self.advice.why_nothing_reused(item, reason)) for item in first]

    @contextmanager
    def within(self, session: Session) -> Iterator[None]:
        """Calls inside the block belong to a session."""
        token = self._session.set(session)
        try:
            yield
        finally:
            self._session.reset(token)

    def close(self, session: Session, quiet: bool = False) -> None:
        """End a session, free its caches, and unless `quiet` warn when it did not do what its policy was chosen for."""
        session.close()
        if not quiet:
            self.advice.session_over(session.ended)

    def graph_modules(self) -> Iterator[nn.Module]:
        """Every graph of every program; some hold the same tensors."""
        for program in self.programs.values():
            yield from program.graph_modules()

    def forget_programs(self) -> None:
        """Drop graphs and caches: the weights changed their type, or are laid out otherwise."""
        self.trajectories.clear()
        self.programs.clear()
        self.fixed.clear()
        self.reset_stats()

    # -- reports ------------------------------------------------------------------------------------------------

    def reset_stats(self) -> None:
        """Start counting anew; trajectories go on."""
        self.accounting = Accounting()

    def stats(self) -> Statistics:
        """Totals so far; waits for the device, and measures FLOPs once for each program and batch size."""
        if self.policy is not None:
            for trajectory in self.trajectories.values():
                settled = trajectory.cached_steps or trajectory.step > self.policy.schedule.settles
                if settled and not trajectory.announced:
                    self.advice.nothing_reused(trajectory, "stats() was called")
        return self.accounting.statistics()

    def memory(self) -> MemoryReport:
        """Bytes that caches hold now, all contexts together."""
        held = []
        batch = 0
        for trajectory in self.trajectories.values():
            assert trajectory.program.graphs is not None
            batch += trajectory.batch
            for state, tensor in trajectory.held():
                held.append((state, tensor.numel() * tensor.element_size()))
            if trajectory.probed is not None and trajectory.program.graphs.probe is not None:
                probed = trajectory.probed
                held.append((trajectory.program.graphs.probe.state, probed.numel() * probed.element_size()))
        return report(held, batch)

    def cache(self, name: str) -> dict[str, Tensor]:
        """The cache tensors of a context by state name; empty before its first step."""
        held: dict[str, list[Tensor]] = {}
        for key in self._keys(name):
            for state, tensor in self.trajectories[key].held():
                held.setdefault(state.name, []).append(tensor)
        return {state: parts[0] if len(parts) == 1 else torch.cat(parts) for state, parts in held.items()}


def _autocast_of(signature: Signature) -> Autocast:
    """What a call is made under."""
    autocast: Autocast = signature[2]
    return autocast


def _layers(regions: Iterable[MoERegion]) -> str:
    return ", ".join(region.path for region in regions) or "no layers"


def _key(context: str, chunk: int) -> Key:
    """Of a chunk's trajectory."""
    return (context, chunk) if chunk else context


def original_view(model: nn.Module) -> nn.Module:
    """The same modules and weights under the original class, whose forward is the one to trace."""
    _transformed, _mixin, original = type(model).__mro__[:3]
    view: nn.Module = object.__new__(original)
    hooked = whole_model_hook(model) is not None
    with without_hook(model):  # which would run the transformed model
        object.__setattr__(view, "__dict__", dict(model.__dict__) if hooked else model.__dict__)
    return view


def _detached(value: Any) -> Any:
    """Inputs as ordinary tensors: inference tensors cannot be traced."""
    return pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, value)
