"""to_pt2, to_aotinductor and a graph a step: every form of an artefact runs the model, whatever its policy."""

import json
import shutil
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moeca_fx
from moeca_fx import MoECa
from moeca_fx.errors import ConfigError, ExportError, MoecaError
from moeca_fx.export import ExportedModel, load, to_aotinductor, to_onnx, to_pt2, to_tensorrt
from moeca_fx.export.manifest import FILE, sha256
from moeca_fx.policies import Method
from moeca_fx.policies.registry import build
from moeca_fx.runtime.module import TransformedModel
from tests.helpers import zoo_models
from tests.helpers.toys import toy_inputs
from tests.helpers.transformed import SOME, as_new, run, toy_pair

pytestmark = [pytest.mark.artefact, pytest.mark.filterwarnings("ignore::moeca_fx.NothingReusedWarning")]

POLICY = MoECa(interval=3, tau0=0.6)
SIZES = (1, 2, 5)
STEPS = 8
POLICIES: dict[str, dict[str, Any]] = {
    "fora": {},
    "taylorseer": {},
    "teacache": {"steps": STEPS},
    "toca": {"steps": STEPS},
    "duca": {"steps": STEPS},
    "dbcache": {},
    "branch_forecast": {},
    "sublayer_forecast": {},
    "forecast": {},
}
FAST = ("fora",)


@cache
def _traced(depth: int) -> tuple[nn.Module, TransformedModel]:
    model = zoo_models.tiny_dsmoe(depth=depth)
    return model, moeca_fx.transform(model, zoo_models.inputs(), policy=None)


def _compare(
    folder: Path, fast: TransformedModel, steps: Iterable[tuple[Tensor, ...]], tolerance: float
) -> ExportedModel:
    artefact = load(folder)
    as_new(fast)
    steps = list(steps)
    for found, expected in zip(run(artefact, steps), run(fast, steps), strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert artefact.stats() == fast.stats()
    return artefact


def _toy_steps(batch: int) -> list[tuple[Tensor, ...]]:
    start, drift = toy_inputs(batch)[0], toy_inputs(batch, seed=1)[0]
    return [(start + 0.05 * step * drift, torch.full((batch,), 0.02 * step)) for step in range(STEPS)]


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in POLICIES]
)
def test_every_policy(name: str, tmp_path: Path) -> None:
    model, plain = _traced(2 if name in FAST else 4)  # two dense and two MoE blocks: every policy can work on them
    method: Method = build(name, **POLICIES[name])
    manifest = to_pt2(model, tmp_path, zoo_models.inputs(), policy=method, batch=SIZES)
    names = [graph["name"] for graph in manifest.graphs]
    assert "full" in names and len(names) == len(manifest.steps) >= 2
    fast = plain.with_policy(method)
    artefact = _compare(tmp_path, fast, zoo_models.trajectory(3, STEPS), 1e-4)
    assert artefact.stats().cached_steps > 0
    assert artefact.memory() == fast.memory()


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_in_onnxruntime(name: str, tmp_path: Path) -> None:
    model, plain = _traced(4)
    method = build(name, **POLICIES[name])
    to_onnx(model, tmp_path, zoo_models.inputs(), policy=method, batch=SIZES)
    for batch in (1, 5):
        _compare(tmp_path, plain.with_policy(method), zoo_models.trajectory(batch, STEPS), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("graphs", ["one", "steps"])
def test_a_program_of_torch_is_bit_equal_to_its_graph(graphs: Any, tmp_path: Path) -> None:
    model, fast = toy_pair(POLICY)
    to_pt2(model, tmp_path, toy_inputs(), policy=POLICY, batch=SIZES, graphs=graphs)
    names = ["model.pt2"] if graphs == "one" else ["cached.pt2", "full.pt2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, FILE])
    for name in names:
        program = torch.export.load(tmp_path / name)
        torch.export.save(program, tmp_path / "round.pt2")
        other = torch.export.load(tmp_path / "round.pt2")
        inputs, _ = program.example_inputs  # type: ignore[misc]  # they were saved
        with torch.no_grad():
            pairs = zip(program.module()(*inputs), other.module()(*inputs), strict=True)
            assert all(torch.equal(have, want) for have, want in pairs)
    _compare(tmp_path, fast, _toy_steps(3), 1e-5)


@pytest.mark.parametrize("name", ["fora", pytest.param("moeca", marks=pytest.mark.slow)])
def test_graphs_a_step_share_their_weights_in_onnx(name: str, tmp_path: Path) -> None:
    model, plain = toy_pair(None)
    policy = build(name)
    to_onnx(model, tmp_path, toy_inputs(), policy=policy, batch=SIZES, graphs="steps")
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    stored = (tmp_path / "weights.data").stat().st_size
    assert 0.9 * weights < stored < 1.2 * weights  # once; the smallest stay in the graphs
    steps = [step["name"] for step in json.loads((tmp_path / FILE).read_text())["steps"]]
    assert steps == ["full", "cached"]
    _compare(tmp_path, plain.with_policy(policy), _toy_steps(5), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experts", "lengths"),
    [
        ("dense", "auto"),
        ("padded", "auto"),
        ("padded", "range"),
        ("unrolled", "range"),
        ("dense", "input"),
        ("auto", "input"),
    ],
)
def test_every_form_of_experts_and_lengths(experts: Any, lengths: Any, tmp_path: Path) -> None:
    """The default of each format is what every other test runs."""
    model, fast = toy_pair(POLICY)
    to_onnx(model, tmp_path, toy_inputs(), policy=POLICY, batch=SIZES, experts=experts, lengths=lengths)
    for batch in (1, 5):
        _compare(tmp_path, fast, _toy_steps(batch), 1e-4)


@pytest.mark.parametrize(("tau0", "reused"), [(50.0, 1.0), (1e-6, 0.0)])
def test_lists_of_nothing_and_of_everything(tau0: float, reused: float, tmp_path: Path) -> None:
    """Steps that refresh no row at all, or all: lists are exact, and caches stay where they lie."""
    policy = MoECa(interval=4, tau0=tau0)
    model, fast = toy_pair(policy)
    manifest = to_onnx(model, tmp_path, toy_inputs(), policy=policy, batch=SIZES)
    (graph,) = manifest.graphs
    assert {name.rpartition(".")[2] for name in graph["in_place"]} >= {"feature", "key", "value", "attn", "norm"}
    steps = [(toy_inputs(3)[0], torch.full((3,), 0.02 * step)) for step in range(STEPS)]  # the router decides alike
    artefact = _compare(tmp_path, fast, steps, 1e-5)
    assert artefact.stats().reuse_ratio == reused
    before = {name: tensor.data_ptr() for name, tensor in artefact.cache().items()}
    artefact(steps[-1][0], torch.full((3,), 0.02 * STEPS))
    after = {name: tensor.data_ptr() for name, tensor in artefact.cache().items()}
    kept = {name for name in before if before[name] == after[name]}
    assert {f"cache_out.{name}" for name in kept} >= set(graph["in_place"])


def test_experts_that_cannot_be(tmp_path: Path) -> None:
    model, _ = toy_pair(None)
    for write, wrong in ((to_pt2, "unrolled"), (to_tensorrt, "unrolled"), (to_onnx, "sparse")):
        with pytest.raises(ConfigError, match="experts: "):
            write(model, tmp_path, toy_inputs(), policy=POLICY, experts=wrong)  # type: ignore[operator]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["fp16", pytest.param("bf16", marks=pytest.mark.slow)])
def test_fewer_bits(dtype: str, tmp_path: Path) -> None:
    model, plain = _traced(2)
    write = to_onnx if dtype == "fp16" else to_pt2
    manifest = write(model, tmp_path, zoo_models.inputs(), policy=SOME, batch=SIZES, dtype=dtype)
    assert next(model.parameters()).dtype is torch.float32  # a copy was cast
    kinds = {cache["kind"]: cache["dtype"] for cache in manifest.caches}
    assert kinds["feature"] == manifest.dtype == {"fp16": "float16", "bf16": "bfloat16"}[dtype]
    assert kinds["activation"] == kinds["norm"] == kinds["weight"] == "float32"
    assert [item["dtype"] for item in manifest.inputs[:2]] == [manifest.dtype, "float32"]  # the timestep keeps its bits
    artefact = load(tmp_path)
    fast = plain.with_policy(SOME)
    for x, *rest in zoo_models.trajectory(2, 6):
        with torch.no_grad():
            found = zoo_models.prediction(artefact(x.to(getattr(torch, manifest.dtype)), *rest)).float()
            expected = zoo_models.prediction(fast(x, *rest))
        # Of the whole: a token whose expert or decision flips differs by more, without caches too.
        assert (found - expected).norm() < 0.1 * expected.norm()


def test_dtypes_that_cannot_be(tmp_path: Path) -> None:
    model = zoo_models.tiny_ditmoe(depth=1)
    with pytest.raises(ConfigError, match="dtype: expected one of fp32, fp16, bf16, found 'int8'"):
        to_onnx(model, tmp_path, zoo_models.inputs(), dtype="int8")
    with pytest.raises(ExportError, match="onnxruntime has no bf16 on a CPU"):
        to_onnx(model, tmp_path, zoo_models.inputs(), dtype="bf16")
    to_onnx(model, tmp_path, zoo_models.inputs(), policy=None, dtype="bf16", check=False)
    with pytest.raises(ExportError, match="onnxruntime has no bf16 on a CPU"):
        load(tmp_path)


@pytest.mark.slow
def test_a_package_of_aotinductor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOECA_FX_COMPILE", raising=False)
    model = zoo_models.tiny_dsmoe(depth=2)
    to_aotinductor(model, tmp_path, zoo_models.inputs(), policy=SOME, batch=SIZES)
    plain = moeca_fx.transform(model, zoo_models.inputs(), policy=SOME, compile=False)
    for batch in (1, 2, 5):
        _compare(tmp_path, plain, zoo_models.trajectory(batch, 12), 1e-5)


@pytest.mark.parametrize("write", [to_onnx, to_pt2])
def test_a_full_disk(write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=40_000))
    model, _ = toy_pair(None)
    with pytest.raises(MoecaError, match=r"40 kB are free, at least 1\.06 MB are needed; make room"):
        write(model, tmp_path, toy_inputs(), policy=None, batch=SIZES)
    assert list(tmp_path.iterdir()) == []


def test_no_compiler_for_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOECA_FX_COMPILE", "0")
    model, _ = toy_pair(None)
    with pytest.raises(ExportError, match="export to AOTInductor: MOECA_FX_COMPILE=0 is set; export as ONNX"):
        to_aotinductor(model, tmp_path, toy_inputs(), policy=None, batch=SIZES)
    assert list(tmp_path.iterdir()) == []


def test_what_torch_cannot_load(tmp_path: Path) -> None:
    model, _ = toy_pair(None)
    to_pt2(model, tmp_path, toy_inputs(), policy=None, batch=SIZES)
    with pytest.raises(ConfigError, match="providers and threads are onnxruntime's"):
        load(tmp_path, threads=2)
    content = json.loads((tmp_path / FILE).read_text())
    (tmp_path / "model.pt2").write_bytes(b"nothing")
    content["files"] = {"model.pt2": "1" * 64}
    (tmp_path / FILE).write_text(json.dumps(content))
    with pytest.raises(ExportError, match="is not the file"):
        load(tmp_path)
    content["files"] = {"model.pt2": sha256(tmp_path / "model.pt2")}
    (tmp_path / FILE).write_text(json.dumps(content))
    for kind, words in (("pt2", "torch cannot load it"), ("aotinductor", "torch cannot load it")):
        (tmp_path / FILE).write_text(json.dumps(content | {"kind": kind}))
        with pytest.raises(ExportError, match=words):
            load(tmp_path)
