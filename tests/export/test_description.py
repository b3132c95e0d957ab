"""describe_artefact: its numbers are those of an independent count, and what TensorRT rejects is named."""

import json
import shutil
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from moeca_fx import MoECa
from moeca_fx.errors import ConfigError, ExportError
from moeca_fx.export import ArtefactDescription, describe_artefact, engine, load, to_onnx, to_pt2
from moeca_fx.export.engine import Rejection, build_engine, parse_onnx
from moeca_fx.export.manifest import FILE, read_manifest
from tests.helpers.artefacts import cache, cache_ports, make_artefact, refused_artefact, save_nodes
from tests.helpers.toys import toy_inputs
from tests.helpers.transformed import run, toy_pair

pytestmark = pytest.mark.artefact

POLICY = MoECa(interval=3, tau0=0.6)
SIZES = (1, 2, 5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy as ONNX, a graph a step; do not change it."""
    made = tmp_path_factory.mktemp("toy") / "artefact"
    forms: Any = {"graphs": "steps", "experts": "padded", "lengths": "range"}  # as TensorRT asks
    to_onnx(toy_pair(None)[0], made, toy_inputs(), policy=POLICY, batch=SIZES, check=False, **forms)
    return made


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy without caches as a program of torch.export; do not change it."""
    made = tmp_path_factory.mktemp("toy") / "program"
    to_pt2(toy_pair(None)[0], made, toy_inputs(), policy=None, batch=SIZES, check=False)
    return made


@pytest.fixture(scope="module")
def found(folder: Path) -> ArtefactDescription:
    return describe_artefact(folder, tensorrt=False)


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture
def rtx() -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX, which exists for Linux: the extra tensorrt")


# -- graphs -------------------------------------------------------------------------------------------------------


def test_nodes_and_tensors_are_those_that_onnx_counts(folder: Path, found: ArtefactDescription) -> None:
    assert [graph.file for graph in found.graphs] == ["full.onnx", "cached.onnx"]
    for graph in found.graphs:
        model = onnx.load(folder / graph.file)
        assert graph.contents is not None and graph.note is None
        assert dict(graph.contents.operators) == Counter(node.op_type for node in model.graph.node)
        assert graph.contents.nodes == len(model.graph.node) > 100
        counts = [count for _, count in graph.contents.operators]
        assert counts == sorted(counts, reverse=True)
        arrays = [numpy_helper.to_array(item) for item in model.graph.initializer]
        assert (graph.contents.tensors, graph.contents.values, graph.contents.bytes) == (
            len(arrays),
            sum(array.size for array in arrays),
            sum(array.nbytes for array in arrays),
        )


def test_what_the_graphs_take_and_give_and_when_they_run(folder: Path, found: ArtefactDescription) -> None:
    full, cached = found.graphs
    assert (full.steps, cached.steps) == ((("full", None),), (("cached", None),))
    assert [port.name for port in cached.inputs] == ["grid", "clock"]
    assert [port.name for port in cached.outputs] == ["result", "counters"]
    assert full.caches_in == ("storeys.0.layer.activation",)  # the statistic that a full step carries on
    assert len(full.caches_out) == len(cached.caches_in) == len(found.manifest.caches) == 9
    for graph in found.graphs:
        model = onnx.load(folder / graph.file)
        caches = [f"cache_in.{name}" for name in graph.caches_in]
        assert [item.name for item in model.graph.input] == [port.name for port in graph.inputs] + caches
    assert dict(found.files) == {path.name: path.stat().st_size for path in folder.iterdir() if path.name != FILE}
    assert full.bytes == (folder / "full.onnx").stat().st_size


def test_a_program_of_torch_export(program: Path) -> None:
    found = describe_artefact(program)
    (graph,) = found.graphs
    assert graph.contents is not None and graph.steps == (("", None),)
    operators = dict(graph.contents.operators)
    nodes = torch.export.load(program / graph.file).graph.nodes
    assert graph.contents.nodes == sum(node.op == "call_function" for node in nodes) > 50
    for name in ("aten.linear", "aten.softmax"):
        assert operators[name] == sum(str(node.target).startswith(f"{name}.") for node in nodes) > 0
    with zipfile.ZipFile(program / graph.file) as archive:
        weights = [item.file_size for item in archive.infolist() if "/weights/weight_" in item.filename]
    assert (graph.contents.tensors, graph.contents.bytes) == (len(weights), sum(weights))
    assert graph.rejections is None and found.note == "TensorRT reads ONNX alone"
    assert found.cache.total == 0 and [name for name, _ in found.batches[0].flops] == ["uncached"]


class _Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Linear(4, 4, bias=False)
        self.other = torch.nn.Linear(4, 4, bias=False)
        self.other.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.other(self.one(x))
        return result


def test_a_weight_of_two_names_is_there_once(tmp_path: Path) -> None:
    torch.export.save(torch.export.export(_Tied(), (torch.zeros(2, 4),)), tmp_path / "model.pt2")
    (graph,) = describe_artefact(make_artefact(tmp_path, "model.pt2", kind="pt2")).graphs
    assert graph.contents is not None and graph.contents.operators == (("aten.linear", 2),)
    assert (graph.contents.tensors, graph.contents.values, graph.contents.bytes) == (1, 16, 64)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("tensorrt-rtx", "an engine of TensorRT-RTX is compiled"),
        ("aotinductor", "a package of AOTInductor is compiled"),
    ],
)
def test_compiled_files_are_described_from_the_manifest(tmp_path: Path, kind: str, words: str) -> None:
    found = describe_artefact(make_artefact(tmp_path, "model.bin", b"12345", kind=kind, compute_capabilities=["8.9"]))
    (graph,) = found.graphs
    assert graph.contents is None and graph.note == f"{words}: its nodes cannot be listed"
    assert graph.bytes == 5 and [port.name for port in (*graph.inputs, *graph.outputs)] == ["x", "result"]
    assert graph.rejections is None and found.as_dict()["compute_capabilities"] == ["8.9"]


def test_without_the_package_that_reads_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx_ir", None)  # as if it were not installed
    (graph,) = describe_artefact(make_artefact(tmp_path), tensorrt=False).graphs
    assert graph.contents is None and graph.note is not None
    assert "pip install 'moeca_fx[onnx]'" in graph.note


# -- costs --------------------------------------------------------------------------------------------------------


def test_bytes_of_cache_are_those_that_a_run_holds(folder: Path, found: ArtefactDescription) -> None:
    artefact = load(folder)
    with torch.no_grad():
        artefact(toy_inputs(3)[0], torch.zeros(3))
    held = artefact.memory()
    assert {site: 3 * size for site, size in found.cache.sites} == dict(held.sites)
    assert {name: 3 * size for name, size in found.cache.states} == dict(held.states)
    assert [cost.batch for cost in found.batches] == list(SIZES)
    _, cached = found.graphs
    assert set(cached.caches_out) == set(dict(held.states))  # this artefact replaces each
    twice = sum(size for name, size in held.states if name not in cached.in_place)
    for cost in found.batches:
        assert cost.cache_bytes * 3 == cost.batch * held.total
        assert cost.running_bytes * 3 == cost.batch * (held.total + twice)


def test_a_cache_that_no_graph_replaces_is_there_once(tmp_path: Path) -> None:
    kept, replaced, probe = cache("kept", 10), cache("replaced", 3), cache("stream", 7)
    plain = make_artefact(tmp_path)
    graph, step = read_manifest(plain).graphs[0], read_manifest(plain).steps[0]
    graph["inputs"] += cache_ports("in", kept, replaced)
    graph["outputs"] += cache_ports("out", replaced)
    found = describe_artefact(
        make_artefact(
            tmp_path,
            kind="tensorrt",
            caches=[kept, replaced],
            probe={**probe, "every_step": True},
            graphs=[graph],
            steps=[{**step, "name": name} for name in ("full", "fresh", "stale", "probe")],
            flops={
                "by_batch": {
                    "uncached": [5, 100],
                    "full": [7, 110],
                    "probe": [1, 2],
                    "rule 0": [3, 20],
                    "rule 1": [0, 9],
                },
                "each": [[], []],
            },
            batch=[4, 4, 4],
        )
    )
    (cost,) = found.batches
    assert cost.cache_bytes == 4 * 4 * (10 + 3 + 7) and cost.running_bytes == cost.cache_bytes + 4 * 4 * 3
    assert dict(found.cache.states)["blocks.0.stream"] == 28
    assert dict(cost.flops) == {"uncached": 405, "full": 447, "probe": 9, "fresh": 83, "stale": 36}


def test_flops_are_those_that_pytorch_counts(found: ArtefactDescription) -> None:
    _, fast = toy_pair(POLICY)
    run(fast, [(toy_inputs(2)[0], torch.zeros(2))])
    stats = fast.stats()
    flops = dict(found.batches[1].flops)
    assert found.batches[1].batch == 2
    assert (flops["full"], flops["uncached"]) == (stats.flops_executed, stats.flops_uncached)
    assert 0 < flops["cached"] < flops["full"]
    assert list(flops) == ["uncached", "full", "cached"]


def test_caches_that_are_written_in_place_count_once(tmp_path: Path) -> None:
    to_onnx(toy_pair(None)[0], tmp_path, toy_inputs(), policy=POLICY, graphs="steps", batch=SIZES, check=False)
    found = describe_artefact(tmp_path, tensorrt=False)
    full, cached = found.graphs
    assert full.in_place == () and set(cached.in_place) < set(cached.caches_out)
    cost = found.batches[1]
    twice = sum(size for name, size in found.cache.states if name not in cached.in_place)
    assert cost.running_bytes == found.batches[1].cache_bytes + twice * cost.batch // found.cache.batch
    assert cost.running_bytes < 1.5 * cost.cache_bytes


# -- TensorRT -----------------------------------------------------------------------------------------------------


def test_tensorrt_takes_the_graphs_unless_it_is_left_out(
    rtx: None, folder: Path, found: ArtefactDescription, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = describe_artefact(folder)
    assert [graph.rejections for graph in asked.graphs] == [(), ()]
    assert asked.tensorrt is not None and asked.tensorrt.startswith("tensorrt-rtx 1.")
    assert (found.tensorrt, found.note) == (None, "left out on request")
    assert [graph.rejections for graph in found.graphs] == [None, None]
    monkeypatch.setattr(engine, "_MODULES", {"tensorrt-rtx": "no_such_module"})
    missing = describe_artefact(folder)
    assert missing.graphs[0].rejections is None and missing.note is not None
    assert "pip install 'moeca_fx[tensorrt]'" in missing.note


def test_the_node_that_tensorrt_refuses_is_named(rtx: None, tmp_path: Path) -> None:
    found = describe_artefact(refused_artefact(tmp_path))
    (graph,) = found.graphs
    assert graph.rejections is not None
    (rejection,) = graph.rejections
    assert (rejection.node, rejection.operator, rejection.position) == ("picked", "NonZero", 1)
    assert rejection.reason.startswith("unsupported node: NonZero plugin")
    assert found.as_dict()["graphs"][0]["rejections"][0]["node"] == "picked"
    with pytest.raises(ExportError, match=r"refuses the graph: picked \(NonZero\): unsupported node"):
        build_engine(tmp_path / "model.onnx", found.manifest.graphs[0], (1, 2, 8))


def test_every_operator_that_tensorrt_does_not_have(rtx: None, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="fine"),
        helper.make_node("Det", ["a"], ["b"], name="volume"),
        helper.make_node("Odd", ["a"], ["result"], domain="mine"),
    ]
    save_nodes(tmp_path / "model.onnx", nodes)
    rejections = parse_onnx(tmp_path / "model.onnx", "tensorrt-rtx").rejections
    assert [(item.node, item.operator, item.position) for item in rejections] == [("volume", "Det", 1), ("", "Odd", 2)]
    assert str(rejections[0]) == "volume (Det): unsupported node"
    assert str(rejections[1]).startswith("node 2 (Odd): invalid node")
    contents = describe_artefact(make_artefact(tmp_path)).graphs[0].contents
    assert contents is not None and contents.operators == (("Det", 1), ("Relu", 1), ("mine::Odd", 1))


def test_shapes_that_do_not_fit_are_the_reason(rtx: None, tmp_path: Path) -> None:
    odd = helper.make_tensor("odd", TensorProto.FLOAT, [3, 4], [0.0] * 12)
    save_nodes(tmp_path / "model.onnx", [helper.make_node("MatMul", ["x", "odd"], ["result"], name="product")], [odd])
    (rejection,) = parse_onnx(tmp_path / "model.onnx", "tensorrt-rtx").rejections
    assert rejection.node == "product" and "last dimension of input0 = 4" in rejection.reason


def test_a_file_that_is_no_graph(rtx: None, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    (rejection,) = parse_onnx(tmp_path / "model.onnx", "tensorrt-rtx").rejections
    assert rejection == Rejection("", "", None, "model deserialize failed: Failed to parse the ONNX model.")
    with pytest.raises(ExportError, match=r"model\.onnx: is no ONNX file"):
        describe_artefact(make_artefact(tmp_path))


# -- errors and the record ----------------------------------------------------------------------------------------


def _edit(folder: Path, **fields: object) -> None:
    content = json.loads((folder / FILE).read_text())
    (folder / FILE).write_text(json.dumps(content | fields))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda folder: (folder / FILE).unlink(), "cannot be read"),
    "no JSON": (lambda folder: (folder / FILE).write_text("{"), "cannot be read"),
    "newer": (lambda folder: _edit(folder, format=99), "format 99 is newer"),
    "tampered": (lambda folder: (folder / "full.onnx").write_bytes(b"other"), "is not the file that"),
    "a kind": (lambda folder: _edit(folder, kind="pt3"), r"kind: expected one of onnx, .*, found 'pt3'"),
    "a graph": (lambda folder: _edit(folder, graphs=[{"name": "full"}]), r"a field is damaged \(KeyError: 'file'\)"),
    "another file": (
        lambda folder: _edit(folder, graphs=[{"name": "full", "file": "../full.onnx"}]),
        r"the graph full is in '\.\./full\.onnx', which is none of its files",
    ),
    "steps": (lambda folder: _edit(folder, steps=[{}]), "a field is damaged"),
    "a batch": (lambda folder: _edit(folder, batch=["one", 2, 3]), "a field is damaged"),
    "two batches": (lambda folder: _edit(folder, batch=[1, 2]), "a field is damaged"),
    "inputs": (lambda folder: _edit(folder, inputs=[{"name": "x"}]), r"a field is damaged \(KeyError: 'shape'\)"),
    "a policy": (lambda folder: _edit(folder, policy={"policy": "moeca", "interval": 0}), "policy: .*interval"),
    "no policy's name": (lambda folder: _edit(folder, policy={"interval": 3}), "a field is damaged"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_artefacts(copied: Path, name: str) -> None:
    damage, words = DAMAGE[name]
    damage(copied)
    with pytest.raises(ExportError, match=words):
        describe_artefact(copied, tensorrt=False)


def test_an_error_that_says_what_is_wrong_is_not_called_a_damaged_field(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^.*: providers and threads are onnxruntime's"):
        load(make_artefact(tmp_path, "model.pt2", kind="pt2"), threads=2)


def test_a_program_that_torch_cannot_load(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"model\.pt2: torch cannot load it"):
        describe_artefact(make_artefact(tmp_path, "model.pt2", kind="pt2"))


def test_the_record_is_json_and_holds_no_path(folder: Path, found: ArtefactDescription) -> None:
    text = json.dumps(found.as_dict(), allow_nan=False)
    assert str(folder) not in text
    record = json.loads(text)
    content = json.loads((folder / FILE).read_text())
    for name in ("kind", "model", "dtype", "weights", "batch", "policy", "opset", "versions"):
        assert record[name] == content[name]
    assert record["cache"]["total"] == sum(item["bytes_per_sample"] for item in content["caches"])
    assert record["graphs"][1]["contents"]["operators"]["Reshape"] > 10
    assert record["graphs"][0]["outputs"] == content["graphs"][0]["outputs"][:1]
