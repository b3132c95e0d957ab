"""Prove a block by how its experts are held: as modules, or stacked in parameters of one module."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product

from torch import nn

from moeca_fx.discover.calls import Call, crowded
from moeca_fx.discover.experts import ModuleExperts, as_expert
from moeca_fx.discover.inline.block import Block
from moeca_fx.discover.inline.nearest import Nearest
from moeca_fx.discover.inline.proof import prove_block
from moeca_fx.discover.inline.recorded import NO_MATCH, record_block
from moeca_fx.discover.inline.stacked import (
    Products,
    StackedExperts,
    StackedForm,
    stacked_forms,
    stacked_modules,
    stacked_parameters,
)
from moeca_fx.discover.inline.tape import NotReplayable
from moeca_fx.discover.scales import OffScale
from moeca_fx.reasons import Reason


def prove_modules(
    model: nn.Module,
    experts: Sequence[str],
    keyword: str | None,
    path: str,
    small: Call,
    large: Call,
    nearest: Nearest | None = None,
) -> Block:
    """Prove the block at `path`, whose experts are the modules `experts`, those without parameters too.

    Raises:
        NotReplayable: with the reason.
    """
    modules = [as_expert(model.get_submodule(name), keyword) for name in experts]
    below = [_below(name, path) for name in experts]
    owner, problem = model.get_submodule(path), NotReplayable(NO_MATCH, Reason.ROUTING_UNKNOWN)
    for calls in ((small, large), (crowded(small), crowded(large))):
        more = () if calls[0] is small else (small, large)
        recorded = replace(record_block(owner, _opened(below), *calls, below, nearest=nearest), more=more)
        for dropped in (False, True):
            try:
                return prove_block(recorded, lambda: modules, ModuleExperts(modules), dropped)
            except OffScale:
                raise
            except NotReplayable as reason:
                problem = reason if str(problem) == NO_MATCH else problem
    raise problem


def prove_stacked(
    model: nn.Module,
    container: str,
    count: int,
    path: str,
    small: Call,
    large: Call,
    form: StackedForm | None = None,
    nearest: Nearest | None = None,
) -> tuple[Block, StackedForm]:
    """Prove the block at `path`, whose experts are stacked in parameters of the module `container`.

    Args:
        model: in eval mode.
        container: path of the module that has the parameters.
        count: E.
        path: of the block.
        small, large: calls of the block.
        form: what the experts compute, when it is known.
        nearest: remembers the hypothesis that came nearest.

    Raises:
        NotReplayable: with the reason.
    """
    holder = model.get_submodule(container)
    inner = _below(container, path)
    opened = _opened([f"{inner}.expert"] if inner else ["expert"])
    forms = [form] if form is not None else list(_forms(holder, count))
    own = [name for name, tensor in stacked_parameters(holder, count).items() if tensor.dim() == 3]
    states = [f"{inner}.{name}" if inner else name for name in own]
    owner = model.get_submodule(path)
    unknown = "its stacked parameters have no known form of an expert (docs/discovery.md lists them)"
    reason = NotReplayable(unknown, Reason.STACKED_FORM)
    off: OffScale | None = None
    for calls in ((small, large), (crowded(small), crowded(large))):
        more = () if calls[0] is small else (small, large)
        recorded = replace(
            record_block(owner, opened, *calls, states=states, nearest=nearest, stacked=count), more=more
        )
        products = Products(holder)
        for dropped, chosen in product((False, True), forms):
            together = StackedExperts(products, chosen, count)
            try:
                return prove_block(recorded, partial(stacked_modules, holder, chosen), together, dropped, off), chosen
            except OffScale as problem:
                off = problem
            except NotReplayable as problem:
                reason = reason if str(problem) == NO_MATCH else problem
    raise off or reason


def _forms(holder: nn.Module, count: int) -> list[StackedForm]:
    parameters = stacked_parameters(holder, count)
    widths = dict.fromkeys(size for tensor in parameters.values() if tensor.dim() == 3 for size in tensor.shape[1:])
    return [form for width in widths for form in stacked_forms(parameters, int(width))]


def _below(path: str, owner: str) -> str:
    return path[len(owner) + 1 :] if owner else path


def _opened(experts: Sequence[str]) -> frozenset[str]:
    """Every module on the way to the experts."""
    found = set()
    for path in experts:
        while path := path.rpartition(".")[0]:
            found.add(path)
    return frozenset(found)
