"""The compiler's passes over a `torch.fx.GraphModule`, and their one order."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx, nn

from moeca_fx.autocast import OFF, Autocast
from moeca_fx.discover import MoERegion
from moeca_fx.errors import MoecaError, PassError
from moeca_fx.graph import legality
from moeca_fx.graph.expert_stack import stack_experts
from moeca_fx.graph.sites import Sites
from moeca_fx.graph.storage import Storage
from moeca_fx.passes.cache.graphs import CachedGraphs
from moeca_fx.passes.capture import Captured, capture
from moeca_fx.passes.insert_cache import insert_cache, share_copy
from moeca_fx.passes.locate import locate
from moeca_fx.passes.lower_inplace import lower_inplace
from moeca_fx.passes.lower_kernels import lower_kernels
from moeca_fx.passes.lower_linear import lower_linear
from moeca_fx.passes.narrow_linear import narrow_linear
from moeca_fx.passes.normalize import normalize
from moeca_fx.passes.pack_stream import pack_stream
from moeca_fx.passes.pair_rotary import pair_rotary
from moeca_fx.passes.patch_linear import patch_linear
from moeca_fx.passes.sibling_linears import sibling_linears
from moeca_fx.passes.store_caches import store_caches
from moeca_fx.passes.vectorize_experts import vectorize_experts
from moeca_fx.policies.policy import Policy

__all__ = ["PIPELINE", "POLICY_FREE", "Compilation", "run_pipeline", "watched"]


@dataclass(frozen=True)
class Compilation:
    """What flows through the pipeline; each pass returns it with more filled in.

    Attributes:
        model, regions, args, kwargs, policy: the request. Without a policy there is no cache.
        storage: how vectors of the cache are stored; None in the model's dtype.
        fixed: why the batch size is known to be fixed by the model's code; None tries to leave it open.
        captured: the trace and its input and output structure.
        module: the graph being rewritten.
        sites: what was located.
        graphs: full and cached step, when there is a policy.
        autocast: what the model is run and traced under; its casts are operations of the graph, and passes run without.
    """

    model: nn.Module
    regions: tuple[MoERegion, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    policy: Policy | None
    storage: Storage | None = None
    fixed: str | None = None
    captured: Captured | None = None
    module: fx.GraphModule | None = None
    sites: Sites | None = None
    graphs: CachedGraphs | None = None
    autocast: Autocast = field(default_factory=Autocast.now)

    def graph_modules(self) -> dict[str, fx.GraphModule]:
        """The graphs that exist at this point, by name."""
        if self.graphs is not None:
            return self.graphs.modules()
        return {"": self.module} if self.module is not None else {}


def _capture(work: Compilation) -> Compilation:
    with work.autocast.around():
        captured = capture(work.model, work.regions, work.args, work.kwargs, work.fixed)
    return replace(work, captured=captured, module=captured.module)


def _normalize(work: Compilation) -> Compilation:
    assert work.module is not None
    return replace(work, module=normalize(work.module))


def _locate(work: Compilation) -> Compilation:
    assert work.module is not None and work.captured is not None
    return replace(work, sites=locate(work.module, work.captured.regions))


def _vectorize_experts(work: Compilation) -> Compilation:
    assert work.module is not None and work.captured is not None and work.sites is not None
    stack_experts(work.model, work.regions)
    sites = vectorize_experts(work.module, work.sites, work.captured.regions, work.model, work.autocast)
    return replace(work, sites=sites)


def _pack_stream(work: Compilation) -> Compilation:
    assert work.module is not None and work.sites is not None
    return replace(work, sites=pack_stream(work.module, work.sites))


def _insert_cache(work: Compilation) -> Compilation:
    assert work.module is not None and work.sites is not None
    if work.policy is None:
        return replace(work, module=share_copy(work.module))  # later passes edit in place
    graphs = insert_cache(work.module, work.sites, work.policy)
    return replace(work, graphs=store_caches(graphs, work.storage))


def _lower_linear(work: Compilation) -> Compilation:
    for module in work.graph_modules().values():
        patch_linear(module)
        narrow_linear(module)
        lower_linear(module)
        sibling_linears(module)
    return work


def _pair_rotary(work: Compilation) -> Compilation:
    for module in work.graph_modules().values():
        pair_rotary(module)
    return work


def _lower_kernels(work: Compilation) -> Compilation:
    for module in work.graph_modules().values():
        lower_kernels(module)
    return work


def _lower_inplace(work: Compilation) -> Compilation:
    for rule in work.graphs.rules if work.graphs is not None else ():
        lower_inplace(rule.module)
    return work


PIPELINE: tuple[tuple[str, Callable[[Compilation], Compilation]], ...] = (
    ("capture", _capture),
    # Higher-order calls and identities out of the way: later passes match computation only.
    ("normalize", _normalize),
    # Before experts are lowered: the marker still names its rows, ids and weights as operands.
    ("locate", _locate),
    # Before caches: a cached step needs every branch's feature as a value.
    ("vectorize_experts", _vectorize_experts),
    # Before caches: both steps, and every row gathered from the stream, then read it in order.
    ("pack_stream", _pack_stream),
    ("insert_cache", _insert_cache),
    # After all matching, which knows linears by their ATen name.
    ("lower_linear", _lower_linear),
    # After all matching too: row programs are rebuilt from the model's own operations.
    ("pair_rotary", _pair_rotary),
    # After all matching too. Its kernels write into caches, but only what nothing reads afterwards.
    ("lower_kernels", _lower_kernels),
    # Last: all passes before it may rely on a functional graph.
    ("lower_inplace", _lower_inplace),
)

POLICY_FREE = "pack_stream"
"""The last pass that no policy changes: what it leaves serves any number of policies."""


_watching: ContextVar[Callable[[str, Compilation], None] | None] = ContextVar("moeca_fx_watching", default=None)


@contextmanager
def watched(observe: Callable[[str, Compilation], None]) -> Iterator[None]:
    """Inside the block `observe` is called with (pass name, state) after each pass, whoever runs the pipeline."""
    token = _watching.set(observe)
    try:
        yield
    finally:
        _watching.reset(token)


@contextmanager
def _without_torch_notices() -> Iterator[None]:
    """torch.export copies specs in a way that torch itself deprecates; users can do nothing about it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
        yield


def run_pipeline(
    work: Compilation,
    until: str | None = None,
    observe: Callable[[str, Compilation], None] | None = None,
    after: str | None = None,
) -> Compilation:
    """Run the passes in order, checking the graph after each.

    Args:
        work: a request, or what the pass `after` left.
        after: name of the last pass that `work` has been through; None runs from the first.
        until: name of the last pass to run; None runs all.
        observe: called with (pass name, state) after each pass.

    Raises:
        MoecaError: what a pass found wrong with the model, or a `PassError` naming the pass and those before it.
    """
    names = [name for name, _ in PIPELINE]
    done = names[: names.index(after) + 1] if after is not None else []
    for name, step in PIPELINE[len(done) :]:
        try:
            with _without_torch_notices(), OFF.around():
                work = step(work)
            for module in work.graph_modules().values():
                legality.check(name, module)
        except MoecaError:
            raise
        except (AssertionError, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            before = ", ".join(done) or "none"
            raise PassError(
                f"pass {name!r} failed on {type(work.model).__name__} (passes before it: {before}): "
                f"{type(error).__name__}: {error}; please report this model"
            ) from error
        done.append(name)
        for told in (observe, _watching.get()):
            if told is not None:
                told(name, work)
        if name == until:
            break
    return work
