"""Run the product and the reference side by side and compare outputs and caches after every step."""

import re
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

import moeca_fx
from moeca_fx.runtime.module import TransformedModel
from moeca_fx.runtime.statistics import Statistics
from moeca_fx.zoo import DiTMoE, DSMoE
from tests.reference.block_step import Counts
from tests.reference.cases import Family, tiny_model, trajectory
from tests.reference.network import ReferenceMoECa

MARGIN = 1e-5  # scores and thresholds are fp32 in the product: nearer than this, a decision may differ


@cache
def _traced(family: Family, seed: int) -> tuple[DSMoE | DiTMoE, TransformedModel]:
    model = tiny_model(family, seed)
    return model, moeca_fx.transform(model, next(iter(trajectory(2, 1, 0.3, seed=seed))), policy=None)


def run_both(
    family: Family,
    policy: moeca_fx.MoECa,
    batch: int = 2,
    drift: float = 0.3,
    tick: float = 0.02,
    seed: int = 7,
) -> list[Counts]:
    """Compare a whole trajectory step by step; returns the reference's counts per block over cached steps.

    Outputs and cached tensors must agree to 1e-5 of the largest value, cached experts exactly.
    """
    model, plain = _traced(family, seed)
    inputs = list(trajectory(batch, 6, drift, tick, seed))
    fast = plain.with_policy(policy)
    reference = ReferenceMoECa(model, policy)
    for j, (x, t, y) in enumerate(inputs):
        found = fast(x, t, y)
        expected = reference.step(x, t, y, full=j % policy.interval == 0)
        _compare_outputs(found, expected, where=f"step {j}")
        compare_states(fast.cache(), reference.state(), policy, where=f"step {j}")
    assert reference.margin > MARGIN, "a score comes too close to its threshold to compare; use another seed"
    _compare_counts(fast.stats(), reference.cached_totals)
    return reference.cached_totals


def _compare_counts(found: Statistics, expected: Sequence[Counts]) -> None:
    """Every count of every site equals the reference's total over the cached steps."""
    for site in found.sites:
        block = expected[_place(f"{site.path}.x")[0]]
        if site.kind == "moe":
            have = (site.branches, site.matched, site.recomputed)
            want = (block.branches, block.matched, block.recomputed)
            assert have == want, f"{site.path}: (branches, matched, recomputed) {have}, expected {want}"
        elif site.kind == "attention":
            assert site.rows_recomputed == block.attention_rows, f"{site.path}: attention rows"
        else:
            assert site.rows_recomputed == block.ffn_rows, f"{site.path}: feed-forward rows"


def _compare_outputs(found: object, expected: object, where: str) -> None:
    assert type(found) is type(expected), where
    if isinstance(found, tuple) and isinstance(expected, tuple):
        assert found[1:] == expected[1:], where
        found, expected = found[0], expected[0]
    assert isinstance(found, Tensor) and isinstance(expected, Tensor)
    assert_close(found, expected, f"{where}: output")


def compare_states(
    cache: dict[str, Tensor], blocks: Sequence[dict[str, Tensor]], policy: moeca_fx.MoECa, where: str
) -> None:
    """Compare the product's cache, keyed ``<path with blocks.i>.<state>``, with the reference's block i.

    Every tensor the product holds must be right, and it must hold every tensor that a cached step reads.
    """
    missing = {(i, name) for i, block in enumerate(blocks) for name in _needed(block, i == 0, policy)}
    for key, value in cache.items():
        index, name = _place(key)
        missing.discard((index, name))
        if name == "norm":  # held for speed: the norms of the held features
            expected = blocks[index]["feature"].norm(dim=-1)
        else:
            expected = blocks[index][name]
        if name == "expert":
            assert torch.equal(value, expected), f"{where}: {key}"
        else:
            assert_close(value, expected, f"{where}: {key}")
    assert not missing, f"{where}: not in the cache: {sorted(missing)}"


def _place(key: str) -> tuple[int, str]:
    found = re.search(r"\bblocks\.(\d+)\b.*\.(\w+)$", key)
    assert found is not None, f"unexpected cache key {key!r}"
    return int(found[1]), found[2]


def _needed(block: dict[str, Tensor], first: bool, policy: moeca_fx.MoECa) -> set[str]:
    """The states of a block that cached steps read under this policy; others may be left out of the cache."""
    dense = "ffn" in block
    attention = policy.attention
    if attention == "synchronized" and dense:  # a dense block follows its FFN; the first has nothing to inherit
        attention = {"inherit": "reuse" if first else attention, "reuse": "reuse", "full": "full"}[policy.dense_ffn]
    needed = set(block)
    if attention == "full":
        needed -= {"attn"}
    if attention != "synchronized":
        needed -= {"key", "value"}
    if policy.dense_ffn == "full":
        needed -= {"ffn"}
    if policy.shared_expert == "full":
        needed -= {"shared"}
    return needed


def assert_close(found: Tensor, expected: Tensor, what: str) -> None:
    """Largest difference at most 1e-5 of the largest expected value."""
    assert found.shape == expected.shape, what
    error = float((found.double() - expected.double()).abs().max())
    limit = 1e-5 * float(expected.abs().max())
    assert error <= limit, f"{what}: largest difference {error:.3e}, allowed {limit:.3e}"
