"""Cache states: what a transformed model keeps between steps, named, typed and sized in one place."""

from dataclasses import dataclass, replace

import torch

# Key in a node's metadata: the `Counter` that its FLOPs are proportional to.
SCALES_WITH = "moeca_scales_with"


@dataclass(frozen=True)
class StateSpec:
    """One cache tensor.

    Attributes:
        site: module path of the site, e.g. ``blocks.1.mlp``.
        kind: what it holds, e.g. ``feature``; with the site it makes the name ``blocks.1.mlp.feature``.
        shape: shape of one sample; the tensor is [B, *shape].
        dtype: its dtype.
        carried: whether a full step reads it too (the activation statistic), instead of only overwriting it.
        vector: whether its last axis is a vector that is reused as a value, which may be stored in fewer bits.
    """

    site: str
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    carried: bool = False
    vector: bool = False

    @property
    def name(self) -> str:
        """Unique name, ``<site>.<kind>``."""
        return f"{self.site}.{self.kind}"

    @property
    def empty(self) -> int:
        """What it holds before the first full step: zero, and no expert's or token's id."""
        return -1 if self.kind in ("expert", "token") else 0

    @property
    def node_name(self) -> str:
        """Name of the graph input that carries it."""
        return "cache_" + self.name.replace(".", "_")

    def bytes(self, batch: int) -> int:
        """Bytes for a batch."""
        return batch * torch.Size(self.shape).numel() * self.dtype.itemsize


def older(name: str, terms: int) -> tuple[str, ...]:
    """Names of a state and of the values it had at the full steps before: ``x``, ``x_1``, ``x_2``, ..."""
    return (name, *(f"{name}_{index}" for index in range(1, terms)))


def with_older(state: StateSpec, terms: int, all_carried: bool = False) -> tuple[StateSpec, ...]:
    """A state and its older values; a full step reads each to make the next older one of it.

    Args:
        all_carried: whether a full step reads the oldest too.
    """
    kinds = older(state.kind, terms)
    return tuple(
        replace(state, kind=kind, carried=state.carried or all_carried or index < terms - 1)
        for index, kind in enumerate(kinds)
    )


@dataclass(frozen=True)
class Counter:
    """One number that a cached step counts: (`site`, `kind`), e.g. (``blocks.1.mlp``, ``recomputed``).

    Kinds: ``matched`` and ``recomputed`` branches, ``present`` ones (where slots may be empty), ``shared_rows``,
    ``ffn_rows``, ``moe_rows``, ``attention_rows``, and ``attention_padded`` (query rows that row attention executes,
    padding included).
    """

    site: str
    kind: str
