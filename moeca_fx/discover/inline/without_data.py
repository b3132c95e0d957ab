"""A block that was proven on random numbers, as one that computes shapes: for its model on the meta device.

full([128], 4, device=cpu)  -->  full([128], 4, device=meta)          a constant [3] of numbers  -->  its shape
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from moeca_fx.discover.inline.block import Block
from moeca_fx.discover.inline.tape import Entry, Source

_META = torch.device("meta")


def without_data(block: Block) -> Block:
    """The same block on the meta device; for any layer of the structure that it was proven on."""
    recipe = block.recipe
    sources = {number: _source(source) for number, source in recipe.sources.items()}
    before, after = (tuple(_entry(entry) for entry in part) for part in (recipe.before, recipe.after))
    return replace(block, recipe=replace(recipe, sources=sources, before=before, after=after))


def _source(source: Source) -> Source:
    return Source(source.kind, source.key.to(_META)) if isinstance(source.key, Tensor) else source


def _entry(entry: Entry) -> Entry:
    args, kwargs = pytree.tree_map(_on_meta, (entry.args, dict(entry.kwargs)))
    return replace(entry, args=args, kwargs=kwargs)


def _on_meta(leaf: Any) -> Any:
    return _META if isinstance(leaf, torch.device) else leaf
