"""Two runs of the model, on two samples or more: which method dispatches to each candidate's experts, and with what.

Hooks on the experts record the live Python frames. The innermost frame common to all expert calls whose `self` is a
module of the model is the region; the smallest enclosing module in which a top-k ran is the MoE block. The second run
has twice the samples, so that what grows with the batch can be told from what does not.
"""

import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from moeca_fx.autocast import Autocast
from moeca_fx.batch import batch_size, doubled
from moeca_fx.discover.calls import Call
from moeca_fx.discover.candidates import Candidate
from moeca_fx.errors import InputError
from moeca_fx.model_checks import run_once


@dataclass
class ExpertCalls:
    """Calls of one candidate's experts.

    Attributes:
        count: how many.
        common: frames they all share, outermost first.
        keywords: names by which rows were given; "" stands for by position.
        inputs: storage and shape of each call's rows.
        autocasts: states that they were called under.
    """

    count: int = 0
    common: list[FrameType] = field(default_factory=list)
    keywords: set[str] = field(default_factory=set)
    inputs: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    autocasts: set[Autocast] = field(default_factory=set)

    def add(self, frames: list[FrameType], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Take note of one call."""
        if self.count == 0:
            self.common = frames
        else:
            shared = 0
            while shared < min(len(frames), len(self.common)) and frames[shared] is self.common[shared]:
                shared += 1
            self.common = self.common[:shared]
        self.count += 1
        self.autocasts.add(Autocast.now())
        self.keywords.add("" if args or len(kwargs) != 1 else next(iter(kwargs)))
        for leaf in pytree.tree_leaves((args, dict(kwargs)))[:1]:
            if isinstance(leaf, Tensor):
                self.inputs.append((leaf.data_ptr(), tuple(leaf.shape)))

    @property
    def on_every_token(self) -> bool:
        """Whether each expert ran once on the very same rows: a dense layer, or one that weighs all experts."""
        return self.count >= 2 and len(self.inputs) == self.count and len(set(self.inputs)) == 1


@dataclass
class Probe:
    """What the runs told.

    Attributes:
        experts: by candidate path and first expert.
        topk: stack of running modules at every top-k of the first run.
        args, kwargs: inputs of the first run.
        small, large: calls of the modules around the candidates in both runs, by path.
        paths: module path by identity.
        why_no_large: why there is no second run.
    """

    experts: dict[tuple[str, int], ExpertCalls]
    topk: list[tuple[str, ...]]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    small: dict[str, list[Call]]
    large: dict[str, list[Call]]
    paths: dict[int, str]
    why_no_large: str = ""


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


def key_of(candidate: Candidate) -> tuple[str, int]:
    """Of a candidate among all: attributes of one module may form several."""
    return candidate.path, id(candidate.experts[0][1]) if candidate.experts else 0


def probe(model: nn.Module, candidates: list[Candidate], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Probe:
    """Run the model once and note what its experts and the modules around them were called with.

    One sample is given a second one: an axis of one sample is moved without a copy, so that its run has other
    operations than one of two samples.

    Raises:
        InputError: the model cannot run on these inputs.
    """
    if batch_size(args, kwargs) > 1:
        return _probe(model, candidates, args, kwargs)
    try:
        return _probe(model, candidates, *doubled(args, kwargs))
    except InputError as problem:
        run = _probe(model, candidates, args, kwargs)
        run.why_no_large = _one_batch_size(problem)
        return run


def _one_batch_size(problem: InputError) -> str:
    return f"the model does not run on twice the samples: {problem}"


def _probe(model: nn.Module, candidates: list[Candidate], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Probe:
    experts = {key_of(candidate): ExpertCalls() for candidate in candidates}
    running: list[str] = []
    around = {path for candidate in candidates if not candidate.nested for path in enclosing(candidate)}
    small: dict[str, list[Call]] = {}
    handles: list[Any] = []
    for path, module in model.named_modules():
        handles += _track(module, path, running)
    for candidate in candidates:
        for _, expert in candidate.experts:
            recorder = _frame_recorder(experts[key_of(candidate)])
            handles.append(expert.register_forward_pre_hook(recorder, with_kwargs=True))
    log = _TopKLog(running)
    try:
        eager = torch.compiler.set_stance("force_eager")
        with torch.no_grad(), eager, log, calls_of(model, around, small, batch_size(args, kwargs)):
            run_once(model, args, kwargs)
    finally:
        for handle in handles:
            handle.remove()
    paths = {id(module): path for path, module in model.named_modules()}
    return Probe(experts, log.stacks, args, kwargs, small, {}, paths)


def enclosing(candidate: Candidate) -> list[str]:
    """Paths of the modules that may hold router and dispatch, innermost first; the model itself last."""
    own = candidate.stacked or candidate.attributes
    path = candidate.path if own else candidate.path.rpartition(".")[0]
    found = [path]
    while path:
        path = path.rpartition(".")[0]
        found.append(path)
    return found


@contextmanager
def calls_of(model: nn.Module, paths: set[str], calls: dict[str, list[Call]], samples: int) -> Iterator[None]:
    """Keep copies of the arguments of every call of these modules inside the block."""
    with ExitStack() as stack:
        for path in sorted(paths):
            calls[path] = []
            module = model.get_submodule(path)
            if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
                continue
            hook = module.register_forward_pre_hook(_call_recorder(calls[path], samples), with_kwargs=True)
            stack.callback(hook.remove)
        yield


def _call_recorder(calls: list[Call], samples: int) -> Any:
    def copied(leaf: Any) -> Any:
        return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf

    def record(_module: nn.Module, args: Any, kwargs: Any) -> None:
        if not calls:
            calls.append(Call(pytree.tree_map(copied, args), pytree.tree_map(copied, kwargs), samples))
        else:
            calls.append(calls[0])  # only their number matters

    return record


def run_again(model: nn.Module, run: Probe, seen: Iterable[list[Any]]) -> None:
    """The second run, on twice the samples; on the same ones when the model cannot run on more.

    Args:
        model: as for the first run.
        run: of the first run; gets the calls of this one.
        seen: what is being recorded; emptied when the run is begun anew.
    """
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        if run.why_no_large:
            run_once(model, run.args, run.kwargs)
            return
        more = doubled(run.args, run.kwargs)
        try:
            with calls_of(model, set(run.small), run.large, batch_size(*more)):
                run_once(model, *more)
        except InputError as problem:
            run.why_no_large = _one_batch_size(problem)
            for calls in seen:
                calls.clear()
            run_once(model, run.args, run.kwargs)


def _track(module: nn.Module, path: str, running: list[str]) -> list[Any]:
    """Keep `running` equal to the stack of modules that are executing."""

    def enter(_module: nn.Module, _args: Any) -> None:
        running.append(path)

    def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
        running.pop()

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]


def _frame_recorder(calls: ExpertCalls) -> Any:
    def record(_module: nn.Module, args: Any, kwargs: Any) -> None:
        frame: FrameType | None = sys._getframe(1)
        frames = []
        while frame is not None:
            frames.append(frame)
            frame = frame.f_back
        calls.add(frames[::-1], args, kwargs)

    return record


def enclosing_router(path: str, topk_stacks: list[tuple[str, ...]]) -> str | None:
    """Smallest module at or above `path` (not the model itself) in which a top-k ran."""
    block = path
    while block:
        if any(block in stack for stack in topk_stacks):
            return block
        block = block.rpartition(".")[0]
    return None


def innermost_method(frames: list[FrameType], paths: dict[int, str]) -> tuple[str, str] | None:
    """(module path, method name) of the innermost frame that is a method of a module of the model."""
    for frame in reversed(frames):
        owner = frame.f_locals.get("self")
        if not isinstance(owner, nn.Module) or id(owner) not in paths:
            continue
        function = getattr(type(owner), frame.f_code.co_name, None)
        if callable(function) and getattr(inspect.unwrap(function), "__code__", None) is frame.f_code:
            return paths[id(owner)], frame.f_code.co_name
    return None
