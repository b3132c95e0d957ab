"""One probe run: which method dispatches to each candidate's experts, and under which router.

Hooks on the experts record the live Python frames. The innermost frame common to all expert calls whose `self` is a
module of the model is the region; the smallest enclosing module in which a top-k ran is the MoE block.
"""

import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from moeca_fx.discover.candidates import Candidate
from moeca_fx.discover.records import Refusal
from moeca_fx.model_checks import run_once


@dataclass(frozen=True)
class TracedRegion:
    """A candidate whose dispatching method was seen: (`owner` path, `method`), inside the MoE block `block`."""

    candidate: Candidate
    owner: str
    method: str
    block: str


@dataclass
class _Calls:
    """Expert calls of one candidate: how many, and the frames they all share (outermost first)."""

    count: int = 0
    common: list[FrameType] = field(default_factory=list)

    def add(self, frames: list[FrameType]) -> None:
        if self.count == 0:
            self.common = frames
        else:
            shared = 0
            while shared < min(len(frames), len(self.common)) and frames[shared] is self.common[shared]:
                shared += 1
            self.common = self.common[:shared]
        self.count += 1


class _TopKLog(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves __init_subclass__ untyped
    """Records the stack of running modules at every top-k."""

    def __init__(self, running: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in torch
        self.running = running
        self.stacks: list[tuple[str, ...]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.topk.default:
            self.stacks.append(tuple(self.running))
        return func(*args, **(kwargs or {}))


def probe(
    model: nn.Module, candidates: list[Candidate], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[list[TracedRegion], list[Refusal]]:
    """Run the model once and locate the region of every candidate; see the module docstring."""
    calls: dict[str, _Calls] = {candidate.path: _Calls() for candidate in candidates}
    running: list[str] = []
    handles: list[Any] = []
    for path, module in model.named_modules():
        handles += _track(module, path, running)
    for candidate in candidates:
        for _, expert in candidate.experts:
            handles.append(expert.register_forward_pre_hook(_frame_recorder(calls[candidate.path])))
    log = _TopKLog(running)
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), log:
            run_once(model, args, kwargs)
    finally:
        for handle in handles:
            handle.remove()
    traced: list[TracedRegion] = []
    refused: list[Refusal] = []
    paths = {id(module): path for path, module in model.named_modules()}
    for candidate in candidates:
        result = _judge(candidate, calls[candidate.path], log.stacks, paths)
        if isinstance(result, TracedRegion):
            traced.append(result)
        else:
            refused.append(result)
    return traced, refused


def _track(module: nn.Module, path: str, running: list[str]) -> list[Any]:
    """Keep `running` equal to the stack of modules that are executing."""

    def enter(_module: nn.Module, _args: Any) -> None:
        running.append(path)

    def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
        running.pop()

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]


def _frame_recorder(calls: _Calls) -> Any:
    def record(_module: nn.Module, _args: Any) -> None:
        frame: FrameType | None = sys._getframe(1)
        frames = []
        while frame is not None:
            frames.append(frame)
            frame = frame.f_back
        calls.add(frames[::-1])

    return record


def _judge(
    candidate: Candidate, calls: _Calls, topk_stacks: list[tuple[str, ...]], paths: dict[int, str]
) -> TracedRegion | Refusal:
    def refuse(reason: str, is_moe: bool = False) -> Refusal:
        return Refusal(candidate.path, reason, is_moe)

    if candidate.nested:
        return refuse("a list of blocks: it contains another candidate")
    block = _enclosing_block(candidate.path, topk_stacks)
    if block is None:
        return refuse("no router: no top-k ran in an enclosing module during the probe run")
    if candidate.stacked:
        return refuse(
            "experts stacked in three-dimensional parameters are not supported; keep them as a ModuleList", True
        )
    if calls.count < 2:
        return refuse(f"only {calls.count} of {len(candidate.experts)} experts ran in the probe run", True)
    region = _innermost_method(calls.common, paths)
    if region is None:
        return refuse("no method of the model is common to all expert calls", True)
    owner, method = region
    if any(stack and stack[-1] == owner and owner == block for stack in topk_stacks):
        return refuse(
            f"the router runs inside the dispatching method {owner}.{method} (inline routing); "
            "move the expert loop into a method that takes rows, expert ids and weights",
            True,
        )
    return TracedRegion(candidate, owner, method, block)


def _enclosing_block(path: str, topk_stacks: list[tuple[str, ...]]) -> str | None:
    """Smallest proper ancestor of the candidate (not the model itself) in which a top-k ran."""
    block = path
    while block:
        if any(block in stack for stack in topk_stacks):
            return block
        block = block.rpartition(".")[0]
    return None


def _innermost_method(frames: list[FrameType], paths: dict[int, str]) -> tuple[str, str] | None:
    for frame in reversed(frames):
        owner = frame.f_locals.get("self")
        if not isinstance(owner, nn.Module) or id(owner) not in paths:
            continue
        function = getattr(type(owner), frame.f_code.co_name, None)
        if callable(function) and getattr(inspect.unwrap(function), "__code__", None) is frame.f_code:
            return paths[id(owner)], frame.f_code.co_name
    return None
