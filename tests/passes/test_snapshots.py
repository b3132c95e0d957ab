"""One readable graph text a stage, of a model with one attention and one MoE layer.

Regenerate after an intended change, and read the difference: UPDATE_SNAPSHOTS=1 pytest tests/passes/test_snapshots.py
"""

import os
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from moeca_fx import MoECa, inspect
from moeca_fx.kernels.cpu import ops as kernels
from moeca_fx.ops.cpu_gemm import Fastest
from moeca_fx.passes import PIPELINE
from moeca_fx.passes.kernels import attention
from tests.helpers import zoo_models
from tests.helpers.passes import Stage, staged
from tests.helpers.toys import toy, toy_inputs

LOWER_LINEAR = import_module("moeca_fx.passes.lower_linear")  # the package has a function of that name
HERE = Path(__file__).parent / "snapshots"
STAGES = [
    "capture",
    "normalize",
    "locate",
    "vectorize_experts",
    "pack_stream",
    "insert_cache.full",
    "insert_cache.cached",
    "lower_inplace.cached",
]
FUSED = ("lower_kernels.full", "lower_kernels.cached")
ROTARY = "pair_rotary.full"  # the toy has none


def _stable(text: str) -> str:
    """Region keys carry a number that counts captures in this process."""
    return re.sub(r"#\d+", "#0", text) + "\n"


@pytest.fixture(scope="module", autouse=True)
def same_on_every_machine() -> Iterator[None]:
    """What is measured depends on the machine: the snapshots show torch's linears and the own attention."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LOWER_LINEAR, "fastest_linear", lambda *_, **__: Fastest())
        patch.setattr(attention, "own_attention_up_to", lambda: 1024)
        yield


@pytest.fixture(scope="module")
def fused(same_on_every_machine: None) -> dict[str, str]:
    if not kernels.available():
        pytest.skip("there is no C++ compiler to build the CPU kernels")
    return inspect(toy(), toy_inputs(), policy=MoECa()).graphs


@pytest.fixture(scope="module")
def graphs(same_on_every_machine: None) -> dict[str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "available", lambda: False)  # a machine without a compiler keeps the references
        return inspect(toy(), toy_inputs(), policy=MoECa()).graphs


def _compare(name: str, found: str) -> None:
    path = HERE / f"{name}.txt"
    if os.environ.get("UPDATE_SNAPSHOTS"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(found)
    assert path.exists(), f"no snapshot {path.name}; run with UPDATE_SNAPSHOTS=1 and read it"
    assert found == path.read_text(), f"{path.name} changed; if intended, run with UPDATE_SNAPSHOTS=1"


@pytest.mark.parametrize("stage", STAGES)
def test_graph_text(graphs: dict[str, str], stage: str) -> None:
    _compare(stage, _stable(graphs[stage]))


@pytest.mark.parametrize("stage", FUSED)
def test_graph_text_with_kernels(fused: dict[str, str], stage: str) -> None:
    _compare(stage, _stable(fused[stage]))


def test_graph_text_of_a_model_with_a_rotary_embedding(same_on_every_machine: None) -> None:
    graphs = inspect(zoo_models.tiny("dsmoe"), zoo_models.inputs(), policy=MoECa()).graphs
    _compare(ROTARY, _stable(graphs[ROTARY]))


def test_every_stage_of_the_pipeline_has_a_snapshot() -> None:
    shown = {stage.partition(".")[0] for stage in (*STAGES, *FUSED, ROTARY)}
    assert shown == {name for name, _ in PIPELINE if name != "lower_linear"}  # machine-dependent


def test_sites_text() -> None:
    stage: Stage = staged(toy(), toy_inputs())
    lines = [
        f"{type(site).__name__}\n" + "".join(f"  {name} = {value}\n" for name, value in vars(site).items())
        for site in stage.sites.ordered
    ]
    _compare("sites", "".join(lines))


def test_texts_are_the_same_in_every_run(fused: dict[str, str]) -> None:
    again = inspect(toy(seed=3), toy_inputs(4, seed=5), policy=MoECa()).graphs
    assert {name: _stable(text) for name, text in again.items()} == {
        name: _stable(text) for name, text in fused.items()
    }
