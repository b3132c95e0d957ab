"""The CPU benchmark's parts, on tiny sizes: what they compare must be what they say; times are not judged."""

import json

import pytest
import torch

import moeca_fx
from bench.cpu import __main__ as command
from bench.cpu import steps, trajectories
from bench.cpu.timing import interleave, ratio
from bench.cpu.trajectories import methods
from moeca_fx.kernels.cpu import ops as kernels
from moeca_fx.zoo import catalog
from tests.helpers import zoo_models


def test_interleaving_rotates_and_drops_the_first_round() -> None:
    order: list[str] = []
    seconds = interleave({name: lambda name=name: order.append(name) for name in "abc"}, 2)  # type: ignore[misc]
    assert "".join(order) == "abcbcacab"
    assert all(len(values) == 2 for values in seconds.values())
    order.clear()
    interleave({name: lambda name=name: order.append(name) for name in "ab"}, 1, twice=True)  # type: ignore[misc]
    assert "".join(order) == "aabbbbaa"
    assert ratio([2.0, 4.0, 9.0], [1.0, 2.0, 3.0]) == 2.0


def test_fractions_are_what_is_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    config = zoo_models.tiny_dsmoe().config
    monkeypatch.setitem(catalog.CONFIGS, "tiny", config)
    found = steps.bench_steps("tiny", 3, torch.float32, 1, original=False, fractions=True)
    share = list(found["flops_of_full_step"].values())
    assert share == sorted(share) and len(set(share)) == len(steps.FRACTIONS)
    assert share[0] < 0.2 and share[-1] > 0.5
    assert json.loads(json.dumps(found)) == found
    assert "cached 25%" in command._table("steps", found)


@pytest.mark.parametrize("fraction", steps.FRACTIONS)
def test_branches_are_taken_from_as_many_tokens_as_there_are(fraction: float) -> None:
    expert = torch.arange(5).expand(4, 50, 5).contiguous()
    gone = steps.without_experts(expert, fraction) == steps.NO_EXPERT
    assert float(gone.float().mean()) == pytest.approx(fraction)
    assert float(gone.any(-1).float().mean()) == pytest.approx(min(1.0, 5 * fraction))


@pytest.mark.skipif(not kernels.available(), reason="there is no C++ compiler to build the CPU kernels")
def test_a_layer() -> None:
    from bench.cpu.layers import bench_linearity, sizes_of

    assert sizes_of("dsmoe-s-e48") == (384, 128, 48, 5, 256)
    assert sizes_of("dit-moe-xl") == (1152, 4608, 8, 2, 256)
    assert set(bench_linearity("digits", 1)["of_linear"]) == {"256", "512", "1024", "2048"}


def test_every_policy_has_its_turn() -> None:
    found = methods("digits")
    assert set(moeca_fx.policies.names()) - {"calibrated"} <= set(found) and {"best-4x", "branch-4x"} <= set(found)


@pytest.mark.filterwarnings("ignore::moeca_fx.NothingReusedWarning")
def test_a_policy_runs_with_both_kinds_of_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trajectories, "STEPS", 4)
    found = trajectories.bench_trajectories("digits", 1, 1, ("moeca",), stored="bf16")
    assert list(found["policies"]) == ["vectorised", "moeca", "moeca, bf16"]
    exact, narrow = found["policies"]["moeca"], found["policies"]["moeca, bf16"]
    assert narrow["cache_bytes"] < 0.6 * exact["cache_bytes"]
    assert narrow["flops_speedup"] == pytest.approx(exact["flops_speedup"], rel=0.05)
    assert "moeca, bf16" in command._table("storage", found)


@pytest.mark.artefact
@pytest.mark.filterwarnings("ignore::moeca_fx.NothingReusedWarning")
def test_exported_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime", reason="needs onnxruntime: the extra onnx")
    from bench.cpu.artefacts import bench_onnx

    monkeypatch.setitem(catalog.CONFIGS, "tiny", zoo_models.tiny_dsmoe().config)
    found = bench_onnx("tiny", 2, 1, ("padded",))["padded"]
    share = list(found["flops_of_full_step"].values())
    assert len(share) == 3 and share == sorted(set(share)) and share[0] > 0 and share[-1] < 1
    assert set(found["full_over_plain"]) == {"one", "steps"} and len(found["ms"]) == 2 * 4 + 1
    assert found["of_full_step"]["one: full step"] == found["of_full_step"]["steps: full step"] == 1
