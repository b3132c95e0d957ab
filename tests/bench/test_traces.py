"""What is watched step by step adds up to what was run."""

import pytest
import torch

from moeca_fx import policies
from moeca_fx.bench.traces import trace_drift, trace_reuse, trace_routing
from moeca_fx.errors import InputError
from tests.bench.conftest import STEPS


def test_reuse_step_by_step_is_that_of_the_whole_run(subject, settings):
    trace = trace_reuse(subject, settings, policies.build("moeca", interval=3, tau0=0.4))
    assert trace.steps == (1, 2, 4, 5)
    assert all(0 < share <= 1 for share in (*trace.match, *trace.reuse_over_match))
    assert min(trace.reuse_over_match) < 1  # tau0 is low enough to recompute
    assert len(trace.by_site) == 1 and all(len(shares) == 4 for shares in trace.by_site.values())

    fast = subject.transformed(policies.build("moeca", interval=3, tau0=0.4))
    velocity, (noise, labels) = subject.velocity(fast), subject.start(settings)
    from moeca_fx.zoo.sampling import sample

    sample(velocity, noise[:2], labels[:2], STEPS, seed=settings.seed)
    stats = fast.stats()
    assert sum(trace.match) / 4 == pytest.approx(stats.match_ratio)
    weighted = sum(m * r for m, r in zip(trace.match, trace.reuse_over_match, strict=True)) / sum(trace.match)
    assert weighted == pytest.approx(stats.reuse_over_match)


def test_a_run_without_cached_steps_has_no_reuse(subject, settings):
    with pytest.raises(InputError, match="matches no branches"):
        trace_reuse(subject, settings, policies.build("moeca", interval=1))


def test_drift_is_the_relative_change_of_each_layers_output(subject, settings):
    trace = trace_drift(subject, settings)
    assert trace.drift.shape == (4, STEPS - 1)
    assert [kind for _, kind in trace.sites] == ["attention", "dense_ffn", "attention", "moe"]

    seen = []
    layer = subject.model.get_submodule(trace.sites[3][0])
    handle = layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    x, labels = (part[:2] for part in subject.start(settings))
    velocity = subject.velocity(subject.model)
    with torch.no_grad():
        for step in range(2):
            x = x + velocity(x, torch.full((2,), step / STEPS), labels) / STEPS
    handle.remove()
    assert float(trace.drift[3, 0]) == pytest.approx(float((seen[1] - seen[0]).norm() / seen[0].norm()))
    assert not any(module._forward_hooks for module in subject.model.modules())


def test_routing_counts_every_selection_once(subject, settings):
    traces = trace_routing(subject, settings, windows=4)
    assert len(traces) == 1
    for trace in traces:
        assert trace.counts.shape == (4, 6, 16)
        assert trace.windows == ((0, 1), (2, 2), (3, 4), (5, 5))
        assert trace.counts.sum(dim=1).tolist() == [[length * 2 * 3.0] * 16 for length in (2, 1, 2, 1)]
