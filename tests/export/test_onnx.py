"""to_onnx and load: the artefact is the model, step for step, and what does not fit is refused by name."""

import dataclasses
import json
import shutil
from collections import namedtuple
from pathlib import Path

import jsonschema
import onnx
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from moeca_fx import MoECa
from moeca_fx.errors import ConfigError, ExportError, InputError, MoecaError
from moeca_fx.export import ExportedModel, load, request, to_onnx
from moeca_fx.export import manifest as manifest_module
from moeca_fx.export.manifest import FILE, Manifest
from moeca_fx.export.sessions import onnx as onnx_session
from moeca_fx.export.verify import Verification
from tests.helpers import zoo_models
from tests.helpers.toys import toy_inputs
from tests.helpers.transformed import SOME, as_new, run, toy_pair, zoo_pair
from tests.helpers.zoo_models import Family

pytestmark = pytest.mark.filterwarnings("ignore::moeca_fx.NothingReusedWarning")

POLICY = MoECa(interval=3, tau0=0.6)
SIZES = (1, 2, 5)
_Pair = namedtuple("_Pair", "a b")
DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy, exported; do not change it."""
    made = tmp_path_factory.mktemp("toy") / "artefact"
    model, _ = toy_pair(None)
    to_onnx(model, made, toy_inputs(), policy=POLICY, batch=SIZES)
    return made


@pytest.fixture(scope="module")
def opened(folder: Path) -> ExportedModel:
    return load(folder)


@pytest.fixture
def artefact(opened: ExportedModel) -> ExportedModel:
    opened.reset()
    opened.reset_stats()
    return opened


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def _steps(batch: int, count: int = 12) -> list[tuple[Tensor, ...]]:
    start, drift = toy_inputs(batch)[0], toy_inputs(batch, seed=1)[0]
    return [(start + 0.05 * step * drift, torch.full((batch,), 0.02 * step)) for step in range(count)]


def _results(model: object, steps: list[tuple[Tensor, ...]]) -> list[Tensor]:
    with torch.no_grad():
        return [model(*inputs).clone() for inputs in steps]  # type: ignore[operator]


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_trajectory_and_its_statistics_are_those_of_pytorch(artefact: ExportedModel, batch: int) -> None:
    _, fast = toy_pair(POLICY)
    steps = _steps(batch)
    for found, expected in zip(_results(artefact, steps), run(fast, steps), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    stats = fast.stats()
    assert artefact.stats() == stats
    assert stats.full_steps == 4 and stats.reuse_ratio > 0
    assert artefact.memory() == fast.memory()


def test_contexts_are_trajectories_of_their_own(artefact: ExportedModel) -> None:
    _, fast = toy_pair(POLICY)
    for model in (artefact, fast):
        results = []
        for inputs in _steps(2, 6):
            for name, sign in (("one", 1.0), ("other", -1.0)):
                with model.context(name), torch.no_grad():
                    results.append(model(inputs[0] * sign, inputs[1]).clone())
        if model is artefact:
            found = results
    for have, want in zip(found, results, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)
    assert artefact.stats().trajectories == fast.stats().trajectories == 2


def test_keywords_and_caches_in_place_or_in_two_sets_of_buffers(artefact: ExportedModel) -> None:
    (graph,) = artefact.manifest.graphs
    in_place = {name.removeprefix("cache_out.") for name in graph["in_place"]}
    addresses: dict[str, set[int]] = {}
    for grid, clock in _steps(2, 6):
        artefact(clock=clock, grid=grid)
        for name, tensor in artefact.cache().items():
            addresses.setdefault(name, set()).add(tensor.data_ptr())
    assert 0 < len(in_place) < len(addresses)
    assert {name: len(found) for name, found in addresses.items()} == {
        name: 1 if name in in_place else 2 for name in addresses
    }
    assert artefact.stats().cached_steps == 4


def test_the_manifest_tells_what_it_takes(folder: Path, artefact: ExportedModel) -> None:
    content = json.loads((folder / FILE).read_text())
    assert content["policy"] == {"policy": "moeca", **POLICY.as_dict()}
    assert content["batch"] == [1, 2, 5] and content["parameters"] == ["grid", "clock"]
    assert [item["shape"][0] for item in (*content["inputs"], *content["caches"])] == ["batch"] * 11
    per_sample = sum(item["bytes_per_sample"] for item in content["caches"])
    _results(artefact, _steps(3, 2))
    assert artefact.memory().total == 3 * per_sample
    assert sorted(content["files"]) == ["model.onnx", "weights.data"]
    assert sorted(path.name for path in folder.iterdir()) == [FILE, "model.onnx", "weights.data"]


def test_the_schema_in_the_docs_describes_it(folder: Path) -> None:
    schema = json.loads((DOCS / "manifest.schema.json").read_text())
    fields = dataclasses.fields(Manifest)
    assert list(schema["properties"]) == [field.name for field in fields]
    optional = {field.name for field in fields if field.default is not dataclasses.MISSING} | {
        field.name for field in fields if field.default_factory is not dataclasses.MISSING
    }
    assert set(schema["properties"]) - set(schema["required"]) == optional
    content = json.loads((folder / FILE).read_text())
    jsonschema.validate(content, schema)
    for name, wrong in (
        ("batch", [1, 2]),
        ("kind", "pt3"),
        ("steps", []),
        ("files", {"model.onnx": "short"}),
        ("caches", [{}]),
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(content | {name: wrong}, schema)


def test_nodes_say_where_in_the_model_they_come_from(folder: Path) -> None:
    content = (folder / "model.onnx").read_bytes()
    names = [node.name for node in onnx.load_from_string(content).graph.node]
    assert len(set(names)) == len(names)
    assert {"storeys.0.layer/decision/Greater", "storeys.0.mixing/attended_1/Softmax"} <= set(names)
    of_sites = [name for name in names if name.startswith(("storeys.0.layer/", "storeys.0.mixing/"))]
    assert len(of_sites) > 0.9 * len(names)
    assert str(DOCS.parent).encode() not in content and b"site-packages" not in content


def test_every_node_is_read(folder: Path) -> None:
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    read = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    assert [node.name for node in graph.node if not read & set(node.output)] == []


REFUSED_CALLS = {
    "batch": (lambda: (toy_inputs(6)[0], torch.zeros(6)), r"batches of 1 to 5, found \[6\]"),
    "two batches": (lambda: (toy_inputs(2)[0], torch.zeros(3)), r"found \[2, 3\]"),
    "dtype": (
        lambda: (toy_inputs(2)[0].double(), torch.zeros(2)),
        r"grid: expected .* float32, found .* torch.float64",
    ),
    "shape": (lambda: (toy_inputs(2)[0][:, :3], torch.zeros(2)), "grid: expected"),
    "one too few": (lambda: (toy_inputs(2)[0],), "missing a required argument: 'clock'"),
    "no tensor": (lambda: (toy_inputs(2)[0], 0.5), "clock: expected .*, found float"),
    "not finite": (lambda: (toy_inputs(2)[0] * torch.nan, torch.zeros(2)), "NaN or infinite"),
}


@pytest.mark.parametrize("name", REFUSED_CALLS)
def test_calls_that_do_not_fit(artefact: ExportedModel, name: str) -> None:
    inputs, words = REFUSED_CALLS[name]
    with pytest.raises(InputError, match=words):
        artefact(*inputs())
    _results(artefact, _steps(2, 2))  # it stays usable


def _edit(folder: Path, **fields: object) -> None:
    content = json.loads((folder / FILE).read_text())
    (folder / FILE).write_text(json.dumps(content | fields))


def test_damaged_missing_and_newer_files(copied: Path) -> None:
    graph = copied / "model.onnx"
    whole = graph.read_bytes()
    graph.write_bytes(whole[:-10])
    with pytest.raises(ExportError, match=r"model\.onnx: is not the file that manifest\.json describes"):
        load(copied)
    graph.unlink()
    with pytest.raises(ExportError, match=r"model\.onnx: is missing"):
        load(copied)
    graph.write_bytes(whole)
    load(copied)
    _edit(copied, format=99)
    with pytest.raises(ExportError, match="format 99 is newer"):
        load(copied)
    _edit(copied, format=2, surprise=1)
    with pytest.raises(ExportError, match=r"unknown \['surprise'\]"):
        load(copied)
    (copied / FILE).write_text("{")
    with pytest.raises(ExportError, match="cannot be read"):
        load(copied)
    (copied / FILE).unlink()
    with pytest.raises(ExportError, match="cannot be read"):
        load(copied)


def test_a_manifest_of_another_artefact(copied: Path) -> None:
    content = json.loads((copied / FILE).read_text())
    content["graphs"][0]["inputs"][2]["name"] = "cache_in.elsewhere"
    (copied / FILE).write_text(json.dumps(content))
    with pytest.raises(ExportError, match="differ in inputs and outputs"):
        load(copied)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch", "few"),
        ("caches", [{"site": "x"}]),
        ("sites", [{"site_kind": "moe"}]),
        ("structure", "[1"),
        ("policy", {"policy": "moeca", "interval": 0}),
        ("inputs", None),
        ("graphs", [{"name": "model"}]),
        ("steps", [{"name": "full"}]),
    ],
)
def test_damaged_fields(copied: Path, field: str, value: object) -> None:
    _edit(copied, **{field: value})
    with pytest.raises((ExportError, ConfigError), match="export"):
        load(copied)


def test_a_missing_provider_is_an_error_unless_allowed(folder: Path) -> None:
    with pytest.raises(ExportError, match="onnxruntime has no CUDAExecutionProvider here"):
        load(folder, providers=("CUDAExecutionProvider",))


def test_two_builds_of_onnxruntime(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_session, "_is_installed", lambda name, metadata: name != "onnxruntime-trt-rtx")
    with pytest.raises(ExportError, match="onnxruntime and onnxruntime-gpu are both installed"):
        load(folder)


def test_options_out_of_range(tmp_path: Path) -> None:
    model, _ = toy_pair(None)
    for batch in ((1, 2), (4, 2, 8), 0, (1, 2, True)):
        with pytest.raises(ConfigError, match="batch: expected"):
            to_onnx(model, tmp_path, toy_inputs(), batch=batch)
    with pytest.raises(ExportError, match="opset: expected 18 to 22, found 30"):
        to_onnx(model, tmp_path, toy_inputs(), opset=30)
    for graphs in ("compiled", "many"):
        with pytest.raises(ConfigError, match="graphs: "):
            to_onnx(model, tmp_path, toy_inputs(), graphs=graphs)  # type: ignore[arg-type]
    with pytest.raises(ExportError, match=r"no form as one graph: .* at the sublayer level"):
        to_onnx(model, tmp_path, toy_inputs(), policy="taylorseer", graphs="one")
    with pytest.raises(ConfigError, match="expected a method"):
        to_onnx(model, tmp_path, toy_inputs(), policy=POLICY.policy())  # type: ignore[arg-type]
    (tmp_path / "file").write_text("")
    with pytest.raises(MoecaError, match="cannot write into the folder"):
        to_onnx(model, tmp_path / "file" / "folder", toy_inputs())


def test_an_artefact_that_differs_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request, "verify", lambda *args: Verification(0.5, 0.0, 1.0, 6))
    model, _ = toy_pair(None)
    with pytest.raises(ExportError, match=r"differs from PyTorch: results by 5\.0e-01"):
        to_onnx(model, tmp_path, toy_inputs(), policy=None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("family", zoo_models.FAMILIES)
def test_every_family_with_and_without_caches(family: Family, tmp_path: Path) -> None:
    for policy in (SOME, None):
        model, fast = zoo_pair(family, policy)  # type: ignore[arg-type]
        to_onnx(model, tmp_path, zoo_models.inputs(), policy=policy, batch=SIZES)
        artefact = load(tmp_path)
        for batch in (1, 2, 5):
            artefact.reset_stats()
            as_new(fast)
            for inputs in zoo_models.trajectory(batch, 12):
                with torch.no_grad():
                    found, expected = zoo_models.prediction(artefact(*inputs)), zoo_models.prediction(fast(*inputs))
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            if policy is not None:
                assert artefact.stats() == fast.stats()


def test_a_result_that_a_manifest_cannot_describe() -> None:
    structure = pytree.tree_structure(_Pair(torch.zeros(1), None))
    with pytest.raises(ExportError, match="the model's result cannot be described"):
        manifest_module._structure(structure)
