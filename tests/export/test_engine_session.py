"""Engines at work: tensors bound by address in a stand-in for TensorRT's runtime, which has nothing beyond it."""

import inspect
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moeca_fx import MoECa
from moeca_fx.errors import ConfigError, ExportError
from moeca_fx.export import api, load, to_onnx
from moeca_fx.export import engine as building
from moeca_fx.export.graph import BATCH, FORCE, Port
from moeca_fx.export.lengths import LENGTHS
from moeca_fx.export.manifest import read_manifest, read_port
from moeca_fx.export.sessions import RunOptions, open_session
from moeca_fx.export.sessions import engine as running
from moeca_fx.export.sessions.engine import EngineSession
from moeca_fx.export.sessions.onnx import CPU, OnnxSession
from tests.helpers.toys import toy_inputs
from tests.helpers.transformed import as_new, run, toy_pair

rtx = pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX, which exists for Linux: the extra tensorrt")
from tests.helpers import fake_tensorrt as fake  # noqa: E402  # imports TensorRT-RTX

pytestmark = [pytest.mark.artefact, pytest.mark.filterwarnings("ignore::moeca_fx.NothingReusedWarning")]

POLICY = MoECa(interval=3, tau0=0.6)
X = Port("x", (BATCH, 3), torch.float32)
CACHE = Port("cache_in.a.feature", (BATCH, 3), torch.float32)
NUMBER = Port(FORCE, (), torch.int64)
INPUTS = (X, CACHE, NUMBER)
OUTPUTS = (
    Port("result", (BATCH, 3), torch.float32),
    Port("cache_out.a.feature", (BATCH, 3), torch.float32),
    Port("counters", (2,), torch.int64),
)
STREAM = 7


def _compute(given: list[Tensor]) -> list[Tensor]:
    x, cache, force = given
    return [2 * x + force, cache + x, torch.stack([force, force + 1])]


RECORDED = fake.Recorded(INPUTS, OUTPUTS, _compute, frozenset({FORCE}))


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> fake.FakeTensorRT:
    """The stand-in as TensorRT, and the host's memory as the GPU's."""
    made = fake.FakeTensorRT({b"engine": RECORDED})
    monkeypatch.setattr(running, "find_backend", lambda kind: (kind, made))
    monkeypatch.setattr(running, "_gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(running, "_stream", lambda device: STREAM)
    return made


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "model.engine").write_bytes(b"engine")
    return tmp_path / "model.engine"


@pytest.fixture
def session(module: fake.FakeTensorRT, path: Path) -> EngineSession:
    return EngineSession("tensorrt-rtx", path, INPUTS, OUTPUTS)


def _buffers(batch: int) -> Callable[[], list[Tensor]]:
    return lambda: [torch.full(port.sized(batch), -9, dtype=port.dtype) for port in OUTPUTS]


def _given(batch: int, force: int) -> list[Tensor]:
    return [torch.randn(batch, 3), torch.randn(batch, 3), torch.tensor(force)]


# -- the stand-in -------------------------------------------------------------------------------------------------


def _parameters(documented: str) -> list[list[str]]:
    """Names of the parameters of every overload in pybind11's docstring; those with a default end in ``=``."""
    found = []
    for inner in re.findall(r"\(self: ([^()]*)\)", documented):
        parts = [part for part in inner.split(", ") if part]
        found.append([part.split(":")[0] + ("=" if " = " in part else "") for part in parts[1:]])
    return found


@pytest.mark.parametrize("stand_in", fake.STAND_INS, ids=lambda each: each.__name__)
def test_the_stand_in_has_only_what_tensorrt_has(stand_in: type) -> None:
    real = getattr(rtx, stand_in.__name__)
    public = {name: value for name, value in vars(stand_in).items() if not name.startswith("_")}
    assert public
    for name, value in public.items():
        assert hasattr(real, name), name
        if isinstance(value, property):
            assert isinstance(getattr(real, name), property), name
            continue
        own = list(inspect.signature(value).parameters)[1:]
        overloads = _parameters(getattr(real, name).__doc__)
        assert any(own == [each for each in names if not each.endswith("=")] for names in overloads), (name, overloads)


def test_tensorrt_has_every_name_that_is_used() -> None:
    assert {name for name in vars(fake.FakeTensorRT) if not name.startswith("_")} <= set(dir(rtx))
    assert set(building.DTYPES.values()) <= set(rtx.DataType.__members__)
    assert {"INPUT", "OUTPUT"} <= set(rtx.TensorIOMode.__members__)
    assert {"HOST", "DEVICE"} <= set(rtx.TensorLocation.__members__)
    assert "TF32" in rtx.BuilderFlag.__members__ and _parameters(rtx.Runtime.__init__.__doc__) == [["logger"]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tensorrts_own_runtime_says_what_it_misses(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "_gpu", lambda: torch.device("cpu"))
    with pytest.raises(ExportError, match=r"cannot load the engine: .*CUDA driver version is insufficient"):
        EngineSession("tensorrt-rtx", path, INPUTS, OUTPUTS)


# -- running ------------------------------------------------------------------------------------------------------


def test_a_step_reads_and_writes_where_it_is_told(session: EngineSession, module: fake.FakeTensorRT) -> None:
    for batch, force in ((1, 1), (5, 0), (2, 1)):
        given, made = _given(batch, force), _buffers(batch)()
        found = session.run(given, lambda made=made: made)  # type: ignore[misc]
        assert all(have is buffer for have, buffer in zip(found, made, strict=True))
        for have, want in zip(found, _compute(given), strict=True):
            assert torch.equal(have, want)
    (context,) = module.contexts
    assert context._streams == [STREAM] * 3
    assert context._shapes == {"x": (2, 3), "cache_in.a.feature": (2, 3)}  # of what has a batch, each time anew
    assert context._addresses[FORCE] == given[-1].data_ptr()


def test_buffers_are_handed_out_after_the_inputs_were_checked(session: EngineSession) -> None:
    def no_buffers() -> list[Tensor]:
        raise AssertionError("buffers were taken for a step that cannot run")

    with pytest.raises(ExportError, match="cpu"):
        session.run([torch.empty(2, 3, device="meta"), *_given(2, 1)[1:]], no_buffers)


@pytest.mark.parametrize("hosted", [True, False])
def test_force_lies_where_the_engine_reads_it(
    hosted: bool, module: fake.FakeTensorRT, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "_gpu", lambda: torch.device("meta"))  # no addresses there
    module.engines[b"engine"] = replace(RECORDED, hosted=frozenset({FORCE} if hosted else ()))
    session = EngineSession("tensorrt-rtx", path, INPUTS, OUTPUTS)
    assert session.device == "meta"
    placed = session._place(NUMBER, torch.tensor(1))
    assert placed.device.type == ("cpu" if hosted else "meta")
    with pytest.raises(
        ExportError, match=r"model\.engine: expected x .* on meta, found one on cpu .* move the model's"
    ):
        session._place(X, torch.randn(2, 3))


def test_an_input_from_the_middle_of_memory_is_moved(session: EngineSession) -> None:
    memory = torch.arange(1024, dtype=torch.float32)
    start = -(memory.data_ptr() // 4) % 64
    aligned, odd = memory[start : start + 6].view(2, 3), memory[start + 1 : start + 7].view(2, 3)
    assert aligned.data_ptr() % 256 == 0
    assert session._place(X, aligned) is aligned
    moved = session._place(X, odd)
    assert torch.equal(moved, odd) and moved.data_ptr() != odd.data_ptr()


def test_the_hosts_number_lives_as_long_as_the_step(session: EngineSession) -> None:
    given = _given(2, 1)
    session.run(given, _buffers(2))
    assert [each.data_ptr() for each in session._held] == [given[-1].data_ptr()]


# -- refusals -----------------------------------------------------------------------------------------------------


def test_no_gpu(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for kind in ("tensorrt", "tensorrt-rtx"):
        with pytest.raises(ExportError, match="running an engine needs an NVIDIA GPU"):
            open_session(kind, path, INPUTS, OUTPUTS, RunOptions())


def test_options_and_kinds_that_do_not_fit(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"are onnxruntime's, and this is an engine of TensorRT-RTX"):
        open_session("tensorrt-rtx", path, INPUTS, OUTPUTS, RunOptions(threads=2))
    with pytest.raises(ExportError, match=r"expected one of onnx, .*tensorrt-rtx .* found 'tensorflow'"):
        open_session("tensorflow", path, INPUTS, OUTPUTS, RunOptions())


def test_bytes_that_are_no_engine(module: fake.FakeTensorRT, path: Path) -> None:
    path.write_bytes(b"of another version")
    with pytest.raises(ExportError, match=r"cannot load the engine: stdVersionRead .* export again"):
        EngineSession("tensorrt", path, INPUTS, OUTPUTS)


def test_a_runtime_that_does_not_start(module: fake.FakeTensorRT, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(logger: Any) -> None:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(module, "Runtime", nothing)
    with pytest.raises(ExportError, match=r"does not start on this GPU: no reason given .* returned nullptr"):
        EngineSession("tensorrt", path, INPUTS, OUTPUTS)


def test_no_room_for_a_context(module: fake.FakeTensorRT, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake.ICudaEngine, "create_execution_context", lambda self: None)
    with pytest.raises(ExportError, match="cannot make room for a step"):
        EngineSession("tensorrt", path, INPUTS, OUTPUTS)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (replace(X, name="y"), r"differ in inputs and outputs: \['x', 'y'\]"),
        (replace(X, dtype=torch.float16), r"expected x as \['batch', 3\] FLOAT, .* found \[-1, 3\] HALF"),
        (replace(X, shape=(BATCH, 4)), r"found \[-1, 4\] FLOAT"),
        (replace(X, shape=(BATCH,)), r"found \[-1\] FLOAT"),
    ],
)
def test_an_engine_that_is_not_the_manifests(changed: Port, words: str, module: fake.FakeTensorRT, path: Path) -> None:
    module.engines[b"engine"] = replace(RECORDED, inputs=(changed, *INPUTS[1:]))
    with pytest.raises(ExportError, match=words):
        EngineSession("tensorrt", path, INPUTS, OUTPUTS)


def test_an_output_in_the_hosts_memory(module: fake.FakeTensorRT, path: Path) -> None:
    module.engines[b"engine"] = replace(RECORDED, hosted=frozenset({"counters"}))
    with pytest.raises(ExportError, match=r"every output on the GPU, found \['counters'\]"):
        EngineSession("tensorrt", path, INPUTS, OUTPUTS)


def test_a_shape_that_tensorrt_refuses(session: EngineSession) -> None:
    with pytest.raises(ExportError, match=r"expected x .* found \[6, 3\]: Static dimension mismatch"):
        session.run(_given(6, 1), _buffers(6))


def test_a_step_that_tensorrt_does_not_run(session: EngineSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake.IExecutionContext, "set_tensor_address", lambda self, name, memory: name != "result")
    with pytest.raises(ExportError, match="takes no address for result"):
        session.run(_given(2, 1), _buffers(2))
    monkeypatch.setattr(fake.IExecutionContext, "set_tensor_address", lambda self, name, memory: True)
    with pytest.raises(ExportError, match="could not run the step: Neither address or allocator is set"):
        session.run(_given(2, 1), _buffers(2))


# -- a whole artefact ---------------------------------------------------------------------------------------------


def test_tf32_is_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cleared: list[Any] = []
    monkeypatch.setattr(building, "_check_network", lambda network, ports: None)
    monkeypatch.setattr(building, "_profile", lambda builder, *rest: builder.create_optimization_profile())
    monkeypatch.setattr(rtx.OnnxParser, "parse_from_file", lambda self, path: True)
    monkeypatch.setattr(rtx.IBuilderConfig, "clear_flag", lambda self, flag: cleared.append(flag))
    monkeypatch.setattr(rtx.Builder, "build_serialized_network", lambda self, network, config: b"built")
    assert (
        building.build_engine(tmp_path / "model.onnx", {"inputs": [], "outputs": []}, (1, 2, 5), backend="tensorrt-rtx")
        == b"built"
    )
    assert cleared == [rtx.BuilderFlag.TF32]


@pytest.mark.parametrize(
    ("form", "lengths"),
    [("one", "range"), ("one", "input"), pytest.param("steps", "range", marks=pytest.mark.slow)],
)
def test_an_artefact_runs_as_the_model_does(
    form: Any, lengths: Any, tmp_path: Path, module: fake.FakeTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = toy_pair(None)
    source, made = tmp_path / "onnx", tmp_path / "engine"
    forms: Any = {"graphs": form, "experts": "padded", "lengths": lengths}
    to_onnx(model, source, toy_inputs(), policy=POLICY, batch=(1, 2, 5), check=False, **forms)

    def build(path: Path, graph: Any, batch: Any, **options: Any) -> bytes:
        """An engine that computes what onnxruntime computes."""
        inputs, outputs = ([read_port(item) for item in graph[way]] for way in ("inputs", "outputs"))
        inner = OnnxSession(path, inputs, outputs, [CPU])

        def compute(given: list[Tensor]) -> Any:
            size = next(value.shape[0] for port, value in zip(inputs, given, strict=True) if port.batched)
            return inner.run(given, lambda: [port.empty(size, "cpu") for port in outputs])

        content = str(graph["name"]).encode()
        module.engines[content] = fake.Recorded(tuple(inputs), tuple(outputs), compute, frozenset({FORCE, LENGTHS}))
        return content

    monkeypatch.setattr(api, "find_backend", lambda backend: (backend, module))
    monkeypatch.setattr(api, "build_engine", build)
    made.mkdir()
    api.build_engines(source, made, backend="tensorrt-rtx")
    assert read_manifest(made).kind == "tensorrt-rtx"
    artefact = load(made)
    assert artefact.device == torch.device("cpu")
    _, fast = toy_pair(POLICY)
    for batch in (1, 2, 5):
        artefact.reset()
        artefact.reset_stats()
        as_new(fast)
        start, drift = toy_inputs(batch)[0], toy_inputs(batch, seed=1)[0]
        steps = [(start + 0.05 * step * drift, torch.full((batch,), 0.02 * step)) for step in range(12)]
        with torch.no_grad():
            found = [artefact(*inputs).clone() for inputs in steps]
        for have, want in zip(found, run(fast, steps), strict=True):
            torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)
        assert artefact.stats() == fast.stats() and fast.stats().reuse_ratio > 0
