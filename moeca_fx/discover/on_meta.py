"""Discovery without weights: a model on the meta device has shapes, and routing needs values.

    model on meta:   blocks.0.ff(x [1, 4096, 2560])  -->  one copy on the CPU, random weights, random x: probe and proof
                     blocks.1.ff ... blocks.47.ff    -->  same structure: the same regions under their own paths

Each layer that holds candidate experts is stood in for while the model runs on meta tensors. The first call of every
structure (types, shapes, plain attributes, input shapes) is studied on a copy (`random_weights`), which is then
dropped; the others take over its result, and where the router is inside, its replay. That proves what the code of such
a layer computes, not what it computes with the weights to come; each region names the layer that was proven.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils import _pytree as pytree

from moeca_fx.discover.candidates import Candidate, find_candidates
from moeca_fx.discover.inline.without_data import without_data
from moeca_fx.discover.method import replaced_method
from moeca_fx.discover.random_weights import with_random_weights
from moeca_fx.discover.records import Discovery, MoERegion, Refusal
from moeca_fx.errors import InputError
from moeca_fx.graph.constants import KnownValues, outside_of_traces
from moeca_fx.model_checks import run_once
from moeca_fx.model_copy import share_weights
from moeca_fx.reasons import Reason

Discover = Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], Discovery]
_HELD = "layer"
_ON_DATA = (DataDependentOutputException, DynamicOutputShapeException)


@dataclass(frozen=True)
class _Studied:
    """What a copy of the layer `path` showed: regions and refusals under the path `_HELD`, a result of meta tensors."""

    path: str
    found: Discovery
    result: Any


class _Alone(nn.Module):
    """Holds a copy of a layer, so that discovery sees it below a root."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.add_module(_HELD, layer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own."""
        return self.get_submodule(_HELD)(*args, **kwargs)


def discover_on_meta(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], discover: Discover
) -> Discovery:
    """As `moeca_fx.discover.discover`, for a model whose parameters are on the meta device.

    Args:
        model, args, kwargs: all on the meta device.
        discover: discovery on data, run on copies of single layers.

    Raises:
        InputError: the model cannot run on these inputs.
    """
    candidates = find_candidates(model)
    refused = [
        Refusal(candidate.path, "a list of blocks: it contains another candidate", False, (Reason.LIST_OF_BLOCKS,))
        for candidate in candidates
        if candidate.nested
    ]
    around = {candidate.path: _callable_ancestors(model, candidate) for candidate in candidates if not candidate.nested}
    nothing = "no router: no enclosing layer to look at"
    last = {path: Refusal(path, nothing, False, (Reason.NO_ROUTER,)) for path in around}
    regions: list[MoERegion] = []
    known: dict[Any, _Studied] = {}
    ran, problems = False, []
    while around := {path: layers for path, layers in around.items() if layers}:
        try:
            shown = _run(model, {layers[0] for layers in around.values()}, args, kwargs, known, discover)
            ran = True
        except InputError as problem:
            if not isinstance(problem.__cause__, _ON_DATA):
                raise
            shown = {}  # the dispatch is further out, where no stand-in took its place
            problems.append(problem)
        for path in list(around):
            layer = around[path].pop(0)
            outcome = _outcome(path, layer, shown.get(layer))
            if isinstance(outcome, Refusal):
                last[path] = outcome
            else:
                regions.append(outcome)
                del around[path], last[path]
    if problems and not ran:
        raise problems[0]
    order = {path: index for index, (path, _) in enumerate(model.named_modules())}
    regions.sort(key=lambda region: order[region.path])
    return Discovery(tuple(regions), (*refused, *last.values()))


def _callable_ancestors(model: nn.Module, candidate: Candidate) -> list[str]:
    """Enclosing modules with a forward of their own, the innermost first, without the model itself."""
    own = candidate.stacked or candidate.attributes
    found, path = [], candidate.path if own else candidate.path.rpartition(".")[0]
    while path:
        if type(model.get_submodule(path)).forward is not nn.Module.forward:
            found.append(path)
        path = path.rpartition(".")[0]
    return found


def _run(
    model: nn.Module,
    layers: set[str],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    known: dict[Any, _Studied],
    discover: Discover,
) -> dict[str, _Studied]:
    """Run the model with stand-ins for `layers`; what was learnt of each that was called."""
    shown: dict[str, _Studied] = {}
    model = share_weights(model)  # its memory of earlier calls (`functools.cache`) would keep this one's tensors

    def stand_in(path: str, module: nn.Module) -> Callable[..., Any]:
        def forward(*given: Any, **named: Any) -> Any:
            key = _structure(module, given, named)
            if key not in known:
                with outside_of_traces():
                    known[key] = _study(module, path, given, named, discover)
            shown[path] = known[key]
            return pytree.tree_map_only(Tensor, torch.empty_like, known[key].result)

        return forward

    with ExitStack() as stack:
        for path in sorted(layers):
            module = model.get_submodule(path)
            stack.enter_context(replaced_method(module, "forward", stand_in(path, module)))
        # Fake tensors carry sizes that Python reads from tensors (`KnownValues`), which meta tensors cannot.
        stack.enter_context(torch.no_grad())
        fake = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(KnownValues())
        fake_args, fake_kwargs = pytree.tree_map_only(Tensor, fake.from_tensor, (args, dict(kwargs)))
        run_once(model, fake_args, fake_kwargs)
    return shown


def _outcome(path: str, layer: str, studied: _Studied | None) -> MoERegion | Refusal:
    """The region of the candidate `path`, from a study of the enclosing `layer`."""
    if studied is None:
        return Refusal(path, f"{layer} did not run on the example inputs", False, (Reason.EXPERTS_DID_NOT_RUN,))

    def own(inner: str) -> str:
        return layer + inner.removeprefix(_HELD)

    for region in studied.found.regions:
        if own(region.experts[0]).startswith(path + "."):
            experts = tuple(own(expert) for expert in region.experts)
            free = tuple((index, own(expert)) for index, expert in region.free)
            container = own(region.container) if region.container else ""
            place = replace(region, path=own(region.path), block=own(region.block), container=container)
            replay = without_data(region.replay) if region.replay is not None else None
            return replace(place, experts=experts, free=free, replay=replay, proven_on=studied.path)
    for refusal in studied.found.refused:
        if own(refusal.path) == path:
            return replace(refusal, path=path)
    return Refusal(path, f"no router: no top-k ran in {layer} on random inputs", False, (Reason.NO_ROUTER,))


def _study(module: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any], discover: Discover) -> _Studied:
    alone = _Alone(with_random_weights(module)).eval()
    generator = torch.Generator().manual_seed(0)

    def on_data(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.is_floating_point():
            return torch.randn(leaf.shape, generator=generator).to(leaf.dtype)
        return torch.zeros(leaf.shape, dtype=leaf.dtype)

    real_args, real_kwargs = pytree.tree_map(on_data, args), pytree.tree_map(on_data, kwargs)
    try:
        with torch.no_grad():
            result = run_once(alone, real_args, real_kwargs)
        found = discover(alone, real_args, real_kwargs)
    except InputError as error:
        raise InputError(
            f"a copy of {type(module).__name__} with random weights and inputs: {error}", code=error.code
        ) from error
    meta = pytree.tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, result)
    return _Studied(path, found, meta)


def _structure(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Equal for calls that a layer's code cannot tell apart but by the values of its tensors."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    inputs = [(tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves]
    parts = [(name, type(part), _plain_attributes(part)) for name, part in module.named_modules()]
    tensors = [(name, tuple(value.shape), value.dtype) for name, value in module.state_dict(keep_vars=True).items()]
    return repr((parts, tensors, inputs, str(spec)))


def _plain_attributes(module: nn.Module) -> list[tuple[str, Any]]:
    plain = (int, float, bool, str, tuple, type(None), torch.dtype)
    found = [(name, value) for name, value in vars(module).items() if isinstance(value, plain)]
    return sorted(found, key=lambda pair: pair[0])
