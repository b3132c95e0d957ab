"""Engines: TensorRT-RTX really builds the graphs, without a GPU; cancelling and refusals are clear errors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moeca_fx import MoECa
from moeca_fx.errors import ConfigError, ExportError, MissingExtraError
from moeca_fx.export import api, engine, load, to_onnx, to_tensorrt
from moeca_fx.export.engine import build_engine, parse_capabilities
from moeca_fx.export.manifest import FILE, Manifest, read_manifest
from tests.helpers import zoo_models
from tests.helpers.toys import toy_inputs
from tests.helpers.transformed import SOME, toy_pair, zoo_pair
from tests.helpers.zoo_models import Family

pytestmark = pytest.mark.artefact
rtx = pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX, which exists for Linux: the extra tensorrt")
POLICY = MoECa(interval=3, tau0=0.6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy with its caches as ONNX."""
    made = tmp_path_factory.mktemp("toy") / "onnx"
    model, _ = toy_pair(None)
    to_onnx(model, made, toy_inputs(), policy=POLICY, batch=(1, 2, 5), experts="padded", lengths="range")
    return made


@pytest.fixture(scope="module")
def manifest(folder: Path) -> Manifest:
    return read_manifest(folder)


def _build(folder: Path, manifest: Manifest, **options: Any) -> bytes:
    graph = manifest.graphs[0]
    return build_engine(folder / graph["file"], graph, manifest.batch, **options)


@pytest.mark.parametrize("user_allocation", [False, True])
def test_an_engine_is_built_for_other_gpus(folder: Path, manifest: Manifest, user_allocation: bool) -> None:
    seen: list[tuple[str, int, int]] = []

    def watch(*step: str | int) -> bool:
        seen.append(step)  # type: ignore[arg-type]  # phase, done, total
        return True

    built = _build(
        folder,
        manifest,
        backend="tensorrt-rtx",
        compute_capabilities=("8.9", "12.0"),
        user_allocation=user_allocation,
        progress=watch,
    )
    assert len(built) > 10_000
    assert seen and all(0 < done <= max(total, done) for _, done, total in seen)


@pytest.mark.parametrize("user_allocation", [False, True])
def test_an_engine_that_takes_the_lengths_of_its_lists(tmp_path: Path, user_allocation: bool) -> None:
    model, _ = toy_pair(None)
    manifest = to_onnx(model, tmp_path, toy_inputs(), policy=POLICY, batch=(1, 2, 5), lengths="input", check=False)
    (graph,) = manifest.graphs
    assert graph["inputs"][-1]["name"] == "lengths" and graph["outputs"][-1]["name"] == "needed"
    assert graph["inputs"][-1]["shape"] == graph["outputs"][-1]["shape"] == [len(graph["lists"])]
    built = _build(tmp_path, manifest, compute_capabilities=("8.9",), user_allocation=user_allocation)
    assert len(built) > 10_000


@pytest.mark.parametrize("how", ["False", "an interrupt"])
def test_a_build_is_cancelled(folder: Path, manifest: Manifest, how: str) -> None:
    def stop(*step: str | int) -> bool:
        if how == "False":
            return False
        raise KeyboardInterrupt

    with pytest.raises(ExportError, match="the build was cancelled"):
        _build(folder, manifest, compute_capabilities=("8.9",), progress=stop)


def test_what_is_written(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def copy(model: object, target: Path, *args: object, **options: object) -> Manifest:
        target.mkdir()
        for file in folder.iterdir():
            (target / file.name).write_bytes(file.read_bytes())
        return read_manifest(target)

    monkeypatch.setattr(api, "to_onnx", copy)
    model, _ = toy_pair(None)
    made = tmp_path / "made"
    to_tensorrt(model, made, toy_inputs(), policy=POLICY, backend="tensorrt-rtx", compute_capabilities=("8.9",))
    assert sorted(path.name for path in made.iterdir()) == [FILE, "model.engine"]
    content = json.loads((made / FILE).read_text())
    assert (content["kind"], content["compute_capabilities"]) == ("tensorrt-rtx", ["8.9"])
    assert list(content["files"]) == ["model.engine"] and content["versions"]["tensorrt-rtx"] == rtx.__version__
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ExportError, match=r"running an engine needs an NVIDIA GPU .* found none; take the folder"):
        load(made)
    with pytest.raises(ConfigError, match=r"knows .*89.*, found 3\.1"):
        to_tensorrt(model, tmp_path / "no", toy_inputs(), backend="tensorrt-rtx", compute_capabilities=("3.1",))
    assert list((tmp_path / "no").iterdir()) == []


def test_lists_of_exact_length_are_refused_with_the_way_out(tmp_path: Path) -> None:
    model, _ = toy_pair(POLICY)
    manifest = to_onnx(model, tmp_path, toy_inputs(), policy=POLICY, batch=(1, 2, 5), experts="padded", check=False)
    with pytest.raises(ExportError, match=r"NonZero.*export it with lengths='range' \(--lengths range\)"):
        build_engine(tmp_path / "model.onnx", manifest.graphs[0], manifest.batch, compute_capabilities=("8.9",))


def test_a_network_that_is_not_the_manifests(folder: Path, manifest: Manifest) -> None:
    other = read_manifest(folder)
    other.graphs[0]["inputs"][2]["name"] = "cache_in.elsewhere"
    with pytest.raises(ExportError, match=r"differ in inputs and outputs: .*cache_in\.elsewhere"):
        _build(folder, other)


def test_a_network_of_another_dtype_or_size(folder: Path) -> None:
    other = read_manifest(folder)
    other.graphs[0]["inputs"][0]["dtype"] = "float16"
    with pytest.raises(ExportError, match=r"the network: expected grid as .* HALF, as in the manifest, found .* FLOAT"):
        _build(folder, other)
    other = read_manifest(folder)
    other.graphs[0]["outputs"][-1]["shape"] = [9]
    with pytest.raises(ExportError, match=r"expected counters as \[9\] INT64, .* found \[5\] INT64"):
        _build(folder, other)


def test_a_graph_that_tensorrt_refuses(tmp_path: Path, manifest: Manifest) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(ExportError, match="refuses the graph"):
        _build(tmp_path, manifest)


def test_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="backend: expected one of"):
        engine.find_backend("cuda")  # type: ignore[arg-type]
    monkeypatch.setattr(engine, "_MODULES", {"tensorrt": "no_such_a", "tensorrt-rtx": "no_such_b"})
    with pytest.raises(MissingExtraError, match=r"pip install 'moeca_fx\[tensorrt\]'"):
        engine.find_backend("auto")


@pytest.mark.parametrize(
    ("text", "found"), [("89,120", ("8.9", "12.0")), ("8.9, 12.0", ("8.9", "12.0")), ("", ()), ("86", ("8.6",))]
)
def test_compute_capabilities_as_text(text: str, found: tuple[str, ...]) -> None:
    assert parse_capabilities(text) == found


def test_no_compute_capability() -> None:
    with pytest.raises(ConfigError, match="expected numbers such as 89"):
        parse_capabilities("ada")


@pytest.mark.slow
@pytest.mark.parametrize("policy", [SOME, None], ids=["caches", "none"])
@pytest.mark.parametrize("family", zoo_models.FAMILIES)
def test_engines_of_every_family(family: Family, policy: MoECa | None, tmp_path: Path) -> None:
    model, _ = zoo_pair(family, policy)  # type: ignore[arg-type]
    to_tensorrt(model, tmp_path, zoo_models.inputs(), policy=policy, compute_capabilities=("8.9",), batch=(1, 2, 8))
    assert (tmp_path / "model.engine").stat().st_size > 10_000
