"""What every change of a translated graph does: nodes are put in, under the name of the one that they stand for."""

from collections.abc import Sequence
from typing import Any


def put(model: Any, before: Any, nodes: Sequence[Any], like: Any = None) -> None:
    """Insert nodes; what torch noted of `like`, or else of `before`, such as its place, is theirs too."""
    for made in nodes:
        made.metadata_props.update((before if like is None else like).metadata_props)
        model.graph.insert_before(before, made)
