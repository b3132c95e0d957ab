"""Put operations back together that torch takes apart before a tape sees them, so that passes know them by their name.

t(W); mm(x, t)            -->   linear(x, W)
t(W); addmm(b, x, t)      -->   linear(x, W, b)
native_layer_norm(x, ..)  -->   layer_norm(x, ..)
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from moeca_fx.discover.inline.tape import Entry, Ref

aten = torch.ops.aten


def with_composites(entries: Sequence[Entry], kept: set[int]) -> list[Entry]:
    """The entries with whole operations; transposes that nothing reads afterwards are dropped.

    Args:
        entries: of a recipe.
        kept: values that are read from outside.
    """
    transposed = {entry.outputs[0]: entry.args[0] for entry in entries if entry.target is aten.t.default}
    whole = [_whole(entry, transposed, entries) for entry in entries]
    read = {number for entry in whole for number in entry.reads()} | kept
    return [entry for entry in whole if entry.target is not aten.t.default or entry.outputs[0] in read]


def _whole(entry: Entry, transposed: dict[int | None, Any], entries: Sequence[Entry]) -> Entry:
    args = entry.args
    if entry.target is aten.mm.default and _number(args[1]) in transposed:
        return replace(entry, target=aten.linear.default, args=(args[0], transposed[_number(args[1])]))
    if entry.target is aten.addmm.default and _number(args[2]) in transposed and not entry.kwargs:
        return replace(entry, target=aten.linear.default, args=(args[1], transposed[_number(args[2])], args[0]))
    if entry.target is aten.native_layer_norm.default and not _others_read(entry, entries):
        return replace(entry, target=aten.layer_norm.default, args=args, outputs=entry.outputs[:1])
    return entry


def _number(leaf: Any) -> int | None:
    return leaf.number if isinstance(leaf, Ref) else None


def _others_read(entry: Entry, entries: Sequence[Entry]) -> bool:
    statistics = set(entry.outputs[1:])
    return any(statistics & set(other.reads()) for other in entries)
