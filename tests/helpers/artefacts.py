"""Artefacts made by hand in no time: a manifest and small files, for tests of what reads them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onnx import TensorProto, helper, save

from moeca_fx.export.manifest import FORMAT, Manifest, write_manifest

WIDTH = 4
_IN = {"name": "x", "shape": ["batch", WIDTH], "dtype": "float32"}
_OUT = {"name": "result", "shape": ["batch", WIDTH], "dtype": "float32"}


def cache(kind: str, size: int) -> dict[str, Any]:
    """A cache of the site ``blocks.0`` as a manifest describes it: `size` numbers of 4 bytes a sample."""
    return {
        "site": "blocks.0",
        "kind": kind,
        "shape": ["batch", size],
        "dtype": "float32",
        "empty": 0,
        "carried": False,
        "bytes_per_sample": 4 * size,
    }


def cache_ports(way: str, *caches: dict[str, Any]) -> list[dict[str, Any]]:
    """Inputs (``in``) or outputs (``out``) of caches."""
    return [
        {"name": f"cache_{way}.{item['site']}.{item['kind']}", "shape": item["shape"], "dtype": "float32"}
        for item in caches
    ]


def make_artefact(folder: Path, file: str = "model.onnx", content: bytes = b"some", **fields: Any) -> Path:
    """Write one.

    Args:
        folder: is made unless it is there.
        file: of its only graph; content: of the file, unless it is there already.
        fields: of the manifest, instead of those of a model without caches.
    """
    folder.mkdir(exist_ok=True)
    if not (folder / file).exists():
        (folder / file).write_bytes(content)
    graph = {"name": "model", "file": file, "inputs": [_IN], "outputs": [_OUT], "returns": [["output", 0]]}
    step = {
        "name": "",
        "graph": "model",
        "force": None,
        "reads": [],
        "clock": False,
        "prefix": False,
        "counters": [],
        "actions": [],
    }
    plain: dict[str, Any] = {
        "format": FORMAT,
        "kind": "onnx",
        "files": {},
        "model": "Tiny",
        "weights": "0" * 16,
        "dtype": "float32",
        "batch": [1, 2, 8],
        "policy": None,
        "timestep": None,
        "parameters": ["x"],
        "inputs": [_IN],
        "constants": {},
        "structure": "",
        "results": 1,
        "caches": [],
        "probe": None,
        "graphs": [graph],
        "steps": [step],
        "sites": [],
        "flops": {"by_batch": {"uncached": [5, 100], "full": [5, 100], "probe": [0, 0]}, "each": []},
        "versions": {"moeca_fx": "0.1.0"},
    }
    write_manifest(Manifest(**plain | fields), folder)
    return folder


def save_nodes(path: Path, nodes: Sequence[Any], initializers: Sequence[Any] = ()) -> None:
    """An ONNX file of these nodes, from ``x`` to ``result``."""
    path.parent.mkdir(exist_ok=True)
    ports = [helper.make_tensor_value_info(item["name"], TensorProto.FLOAT, item["shape"]) for item in (_IN, _OUT)]
    graph = helper.make_graph(list(nodes), "model", ports[:1], ports[1:], list(initializers))
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("mine", 1)]
    save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)


def refused_artefact(folder: Path) -> Path:
    """One whose node ``picked`` TensorRT-RTX refuses: it has no NonZero."""
    nodes = [
        helper.make_node("Relu", ["x"], ["positive"], name="relu"),
        helper.make_node("NonZero", ["positive"], ["where"], name="picked"),
        helper.make_node("Cast", ["where"], ["result"], name="cast", to=TensorProto.FLOAT),
    ]
    save_nodes(folder / "model.onnx", nodes)
    return make_artefact(folder)
