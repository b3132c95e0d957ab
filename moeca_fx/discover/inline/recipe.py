"""A recipe: the part of a tape around the experts, which computes the same for any batch and any data.

    two tapes, of batches of 2 and 4                       recipe
      view(v0, [128, 64])    view(v0, [256, 64])             view(v0, [64 * n, 64])        n: leading size of the input
      linear, softmax, topk  linear, softmax, topk           linear, softmax, topk
      nonzero, index, ...    nonzero, index, ...      -->    routed(x, expert, weight)
      view(v19, [2, 64, 64]) view(v19, [4, 64, 64])          view(.., [n, 64, 64])

Both tapes must have the same entries on the way; a size that differs must grow in proportion to the batch.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from moeca_fx.discover.inline.composites import with_composites
from moeca_fx.discover.inline.tape import Entry, NotReplayable, Ref, Source, Tape
from moeca_fx.reasons import Reason

Routed = Callable[..., Tensor]


@dataclass(frozen=True)
class Scaled:
    """A size that is `per_unit` times the leading size of the call's first batched input."""

    per_unit: Fraction

    def at(self, unit: Any) -> Any:
        """The size for a leading size, which may be symbolic."""
        return unit * self.per_unit.numerator // self.per_unit.denominator


@dataclass(frozen=True)
class Recipe:
    """How to compute the outputs of a call, with the routed experts left to a function.

    Attributes:
        sources: what it reads: inputs by position, state by path, constants.
        before: entries up to what the experts take.
        wanted: values that the experts take.
        routed: value that the experts' function gives.
        after: entries from there to the outputs.
        outputs, out_spec: flat results and their structure.
        unit: position of the flat argument whose leading size scales the others.
    """

    sources: Mapping[int, Source]
    before: tuple[Entry, ...]
    wanted: tuple[int, ...]
    routed: int
    after: tuple[Entry, ...]
    outputs: tuple[Any, ...]
    out_spec: pytree.TreeSpec
    unit: int

    def run(self, owner: nn.Module, routed: Routed, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The call's result.

        Args:
            owner: the module that the tape was recorded on, or one of the same structure.
            routed: values of `wanted` -> the routed value.
            args, kwargs: of the call.
        """
        leaves = pytree.tree_leaves((args, dict(kwargs)))
        unit = leaves[self.unit].shape[0]
        values = {number: _read(source, owner, leaves) for number, source in self.sources.items()}
        _run_all(self.before, owner, values, unit)
        values[self.routed] = routed(*(values[number] for number in self.wanted))
        _run_all(self.after, owner, values, unit)
        return pytree.tree_unflatten([_filled(leaf, values, unit) for leaf in self.outputs], self.out_spec)


def make_recipe(small: Tape, large: Tape, wanted: Sequence[int], routed: int) -> Recipe:
    """The common recipe of two tapes of the same call at two batch sizes.

    Args:
        small, large: the tapes.
        wanted: values of `small` that the routed function takes.
        routed: value of `small` that it gives.

    Raises:
        NotReplayable: what lies on the way depends on data, or the tapes differ.
    """
    assert small.out_spec is not None
    if small.out_spec != large.out_spec:
        raise NotReplayable("the structure of its result depends on the batch size", Reason.DEPENDS_ON_THE_BATCH)
    unit = _unit(small, large)
    ratio = (small.sizes[unit], large.sizes[unit])
    before = _slice(small, wanted, stop=routed)
    outputs = [leaf.number for leaf in small.outputs if isinstance(leaf, Ref)]
    known = {id(entry) for entry in before}
    after = [entry for entry in _slice(small, outputs, stop=routed) if id(entry) not in known]
    twins = _Twins(small, large, ratio)
    kept = [twins.merged(entry) for entry in [*before, *after]]
    if len(small.outputs) != len(large.outputs):
        raise NotReplayable("the number of its results depends on the batch size", Reason.DEPENDS_ON_THE_BATCH)
    results = tuple(_merged(a, b, ratio) for a, b in zip(small.outputs, large.outputs, strict=True))
    used = {number for entry in kept for number in entry.reads()} | set(wanted)
    used |= {leaf.number for leaf in results if isinstance(leaf, Ref)}
    sources = {number: source for number, source in small.sources.items() if number in used}
    _check_constants(sources, large, twins)
    early = {number for entry in before for number in entry.outputs}
    composed = with_composites(kept, {*wanted, *outputs})
    first = tuple(entry for entry in composed if entry.outputs[0] in early)
    rest = tuple(entry for entry in composed if entry.outputs[0] not in early)
    return Recipe(sources, first, tuple(wanted), routed, rest, results, small.out_spec, unit)


def _unit(small: Tape, large: Tape) -> int:
    for position, size in small.sizes.items():
        if large.sizes.get(position) != size:
            return position
    raise NotReplayable("none of its tensor arguments has a batch", Reason.DEPENDS_ON_THE_BATCH)


def _slice(tape: Tape, wanted: Iterable[int], stop: int) -> list[Entry]:
    """Entries that `wanted` depends on, in order; `stop` counts as given."""
    makers = {number: entry for entry in tape.entries for number in entry.outputs if number is not None}
    needed: set[int] = set()
    stack, seen = list(wanted), {stop}
    while stack:
        number = stack.pop()
        if number in seen or number not in makers:
            continue
        seen.add(number)
        entry = makers[number]
        if id(entry) not in needed:
            needed.add(id(entry))
            _refuse_data(entry, tape)
            stack += entry.reads()
    return [entry for entry in tape.entries if id(entry) in needed]


def _refuse_data(entry: Entry, tape: Tape) -> None:
    tags = getattr(entry.target, "tags", ())
    if entry.target is torch.ops.aten.index.Tensor:
        places = [tape.values.get(number) for number in entry.reads()[1:]]
        if all(place is not None and place.dtype not in (torch.bool, torch.uint8) for place in places):
            return  # by numbers: as many rows as numbers
    if torch.Tag.dynamic_output_shape in tags or torch.Tag.data_dependent_output in tags:
        raise NotReplayable(f"{entry.target} makes sizes from data, outside of the experts", Reason.DEPENDS_ON_DATA)
    if torch.Tag.nondeterministic_seeded in tags:
        raise NotReplayable(f"{entry.target} draws random numbers", Reason.RANDOM)


class _Twins:
    """Pairs entries of one tape with those of the other, from the sources on.

    Between the kept entries the tapes may differ as they like: what experts do depends on data.
    """

    def __init__(self, small: Tape, large: Tape, ratio: tuple[int, int]) -> None:
        self.ratio = ratio
        self.others: list[Entry | None] = list(large.entries)
        named = {_name(source): number for number, source in large.sources.items()}
        self.values = {n: named[_name(source)] for n, source in small.sources.items() if _name(source) in named}

    def merged(self, entry: Entry) -> Entry:
        """The entry with what grows with the batch marked as such.

        Raises:
            NotReplayable: the other tape has no entry like it, or its numbers do not follow from the batch.
        """
        problem = NotReplayable(
            f"{entry.target} has no counterpart in a run with another batch size", Reason.DEPENDS_ON_THE_BATCH
        )
        for index, other in enumerate(self.others):
            alike = other is not None and (other.target, other.autocast) == (entry.target, entry.autocast)
            if other is None or not alike or not self._read_alike(entry, other):
                continue
            try:
                merged = _merged_entry(entry, other, self.ratio)
            except NotReplayable as reason:
                problem = reason
                continue
            self.others[index] = None
            self.values |= dict(zip(entry.reads(), other.reads(), strict=True))
            pairs = zip(entry.outputs, other.outputs, strict=True)
            self.values |= {mine: theirs for mine, theirs in pairs if mine is not None and theirs is not None}
            return merged
        raise problem

    def _read_alike(self, entry: Entry, other: Entry) -> bool:
        """Whether both read the same values; one without a known twin (the experts' result, a constant) fits any."""
        mine, theirs = entry.reads(), other.reads()
        if len(mine) != len(theirs) or len(entry.outputs) != len(other.outputs):
            return False
        return all(self.values.get(a, b) == b for a, b in zip(mine, theirs, strict=True))


def _name(source: Source) -> Any:
    return (source.kind, id(source.key) if isinstance(source.key, Tensor) else source.key)


def _merged_entry(a: Entry, b: Entry, ratio: tuple[int, int]) -> Entry:
    mine, spec = pytree.tree_flatten((a.args, dict(a.kwargs)))
    theirs, other_spec = pytree.tree_flatten((b.args, dict(b.kwargs)))
    if spec != other_spec:
        raise NotReplayable(
            f"{a.target} takes other arguments in a run with another batch size", Reason.DEPENDS_ON_THE_BATCH
        )
    args, kwargs = pytree.tree_unflatten([_merged(x, y, ratio) for x, y in zip(mine, theirs, strict=True)], spec)
    return Entry(a.target, args, kwargs, a.outputs, a.autocast)


def _merged(a: Any, b: Any, ratio: tuple[int, int]) -> Any:
    """One leaf for both: equal, the same value, or a size in proportion to the batch."""
    if isinstance(a, Ref) and isinstance(b, Ref):
        return a
    if type(a) is type(b) and (a == b or (a != a and b != b)):
        return a
    if type(a) is int and type(b) is int and a * ratio[1] == b * ratio[0]:
        return Scaled(Fraction(a, ratio[0]))
    raise NotReplayable(
        f"a number around the experts depends on data: {a!r} in one run, {b!r} in another", Reason.DEPENDS_ON_DATA
    )


def _check_constants(sources: Mapping[int, Source], large: Tape, twins: _Twins) -> None:
    for number, source in sources.items():
        if source.kind == "constant":
            other = large.sources.get(twins.values.get(number, -1))
            same = other is not None and isinstance(other.key, Tensor) and isinstance(source.key, Tensor)
            if not same or not torch.equal(other.key, source.key):  # type: ignore[union-attr, arg-type]
                raise NotReplayable(
                    "a tensor around the experts is made outside of torch from data", Reason.DEPENDS_ON_DATA
                )


def _read(source: Source, owner: nn.Module, leaves: list[Any]) -> Any:
    if source.kind == "input":
        return leaves[source.key]  # type: ignore[index]
    if source.kind == "constant":
        return source.key
    path, _, name = str(source.key).rpartition(".")
    return getattr(owner.get_submodule(path), name)


def _filled(tree: Any, values: Mapping[int, Any], unit: Any) -> Any:
    def fill(leaf: Any) -> Any:
        if isinstance(leaf, Ref):
            return values[leaf.number]
        return leaf.at(unit) if isinstance(leaf, Scaled) else leaf

    return pytree.tree_map(fill, tree, is_leaf=lambda leaf: isinstance(leaf, (Ref, Scaled)))


def _run_all(entries: Sequence[Entry], owner: nn.Module, values: dict[int, Any], unit: Any) -> None:
    for autocast, group in groupby(entries, key=lambda entry: entry.autocast):
        with autocast.around():
            for entry in group:
                _run(entry, owner, values, unit)


def _run(entry: Entry, owner: nn.Module, values: dict[int, Any], unit: Any) -> None:
    args, kwargs = _filled(entry.args, values, unit), _filled(dict(entry.kwargs), values, unit)
    target = owner.get_submodule(entry.target) if entry.is_module else entry.target
    leaves = pytree.tree_leaves(target(*args, **kwargs))
    values |= {number: leaf for number, leaf in zip(entry.outputs, leaves, strict=True) if number is not None}
