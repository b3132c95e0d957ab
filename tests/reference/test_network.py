"""The reference network: equal to the model when everything is computed, else sparing in the right places."""

import pytest
import torch
from torch import Tensor

from tests.reference.cases import FAMILIES, Family, ReferenceConfig, tiny_model, trajectory
from tests.reference.network import ReferenceMoECa

families = pytest.mark.parametrize("family", FAMILIES)


def _prediction(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@families
def test_full_steps_equal_the_model(family: Family) -> None:
    model = tiny_model(family)
    reference = ReferenceMoECa(model, ReferenceConfig())
    for x, t, y in trajectory(batch=3, steps=2, drift=0.5):
        output = reference.step(x, t, y, full=True)
        expected = model(x, t, y)
        assert type(output) is type(expected)
        assert _error(_prediction(output), _prediction(expected)) < 1e-6  # the routers compute in fp32


@families
def test_recomputing_everything_equals_the_model(family: Family) -> None:
    """tau0 = 0 refreshes every token of every MoE block; with dense blocks run in full nothing is stale."""
    model = tiny_model(family)
    reference = ReferenceMoECa(model, ReferenceConfig(tau0=0.0, dense_ffn="full"))
    for j, (x, t, y) in enumerate(trajectory(batch=2, steps=3, drift=0.5)):
        output = reference.step(x, t, y, full=j == 0)
        assert _error(_prediction(output), _prediction(model(x, t, y))) < 1e-6
    assert sum(counts.recomputed for counts in reference.counts) > 0


@families
def test_reusing_everything_keeps_the_cache_but_not_the_output(family: Family) -> None:
    """Nothing over the threshold: the cached tensors stay, the current gates and weights still act."""
    model = tiny_model(family)
    config = ReferenceConfig(tau0=50.0, attention="reuse", dense_ffn="reuse", shared_expert="reuse")
    reference = ReferenceMoECa(model, config)
    (x0, t0, y), (x1, t1, _) = trajectory(batch=2, steps=2, drift=1e-4)
    first = _prediction(reference.step(x0, t0, y, full=True))
    before = reference.state()
    second = _prediction(reference.step(x1, t1, y, full=False))
    counts = reference.cached_totals
    assert sum(c.matched for c in counts) == sum(c.branches for c in counts) > 0
    assert sum(c.recomputed + c.attention_rows + c.shared_rows + c.ffn_rows for c in counts) == 0
    for old, new in zip(before, reference.state(), strict=True):
        for name in old.keys() - {"activation"}:
            assert torch.equal(old[name], new[name])
    assert not torch.equal(first, second)
    assert 1e-4 < _error(second, _prediction(model(x1, t1, y))) < 0.5


@families
def test_only_refreshed_rows_are_written(family: Family) -> None:
    """Attention, keys, values and shared rows change in as many tokens as the counts say, no more."""
    model = tiny_model(family)
    reference = ReferenceMoECa(model, ReferenceConfig(tau0=0.6))
    (x0, t0, y), (x1, t1, _) = trajectory(batch=2, steps=2, drift=0.3)
    reference.step(x0, t0, y, full=True)
    before = reference.state()
    reference.step(x1, t1, y, full=False)
    partial = 0
    for old, new, counts in zip(before, reference.state(), reference.counts, strict=True):
        rows = {name: (old[name] != new[name]).flatten(2).any(-1).sum() for name in ("attn", "key", "value")}
        assert rows == {
            "attn": counts.attention_rows,
            "key": counts.attention_rows,
            "value": counts.attention_rows,
        }
        if "ffn" in new:
            assert (old["ffn"] != new["ffn"]).any(-1).sum() == counts.ffn_rows
            continue
        assert (old["feature"] != new["feature"]).any(-1).sum() == counts.recomputed
        assert (old["shared"] != new["shared"]).any(-1).sum() == counts.shared_rows
        partial += 0 < counts.attention_rows < old["attn"].shape[0] * old["attn"].shape[1]
    assert partial > 0


@families
def test_a_dense_block_before_any_moe_block_reuses_all(family: Family) -> None:
    model = tiny_model(family)
    reference = ReferenceMoECa(model, ReferenceConfig(tau0=0.0))
    for j, (x, t, y) in enumerate(trajectory(batch=2, steps=2, drift=0.3)):
        reference.step(x, t, y, full=j == 0)
    is_dense = ["ffn" in state for state in reference.state()]
    rows = [(c.attention_rows, c.ffn_rows) for c in reference.counts]
    if family == "dsmoe":
        assert is_dense == [True, False, True, False]
        assert rows == [(0, 0), (32, 0), (32, 32), (32, 0)]
    else:
        assert not any(is_dense)
        assert rows == [(32, 0)] * len(rows)


@families
def test_a_sample_alone_equals_the_sample_in_a_batch(family: Family) -> None:
    model = tiny_model(family)
    config = ReferenceConfig(tau0=0.6)
    together, alone = ReferenceMoECa(model, config), ReferenceMoECa(model, config)
    for j, (x, t, y) in enumerate(trajectory(batch=3, steps=3, drift=0.3)):
        batched = _prediction(together.step(x, t, y, full=j == 0))
        single = _prediction(alone.step(x[1:2], t[1:2], y[1:2], full=j == 0))
        assert torch.equal(batched[1:2], single)
