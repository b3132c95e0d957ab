"""Weight files that load, and every way in which one may not."""

import pickle
import sys
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

from moeca_fx.errors import MissingExtraError, WeightsError
from moeca_fx.zoo import DSMoE, load_weights, randomize_


@pytest.fixture
def source(dsmoe_config):
    return randomize_(DSMoE(dsmoe_config), seed=99)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.fixture
def unchanged(dsmoe):
    """The model under test; afterwards it must hold the weights it had before."""
    before = {name: value.clone() for name, value in dsmoe.state_dict().items()}
    yield dsmoe
    assert all(torch.equal(value, before[name]) for name, value in dsmoe.state_dict().items())


def test_safetensors(dsmoe, source, tmp_path):
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    load_weights(dsmoe, tmp_path / "w.safetensors")
    assert equal(dsmoe, source)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
@pytest.mark.parametrize("wrapper", [None, "ema", "model", "state_dict"])
def test_torch_files_bare_or_wrapped(dsmoe, source, tmp_path, suffix, wrapper):
    content = source.state_dict() if wrapper is None else {wrapper: source.state_dict(), "step": 7}
    torch.save(content, tmp_path / f"w{suffix}")
    load_weights(dsmoe, str(tmp_path / f"w{suffix}"))
    assert equal(dsmoe, source)


def test_the_average_is_preferred(dsmoe, source, dsmoe_config, tmp_path):
    raw = randomize_(DSMoE(dsmoe_config), seed=5)
    torch.save({"model": raw.state_dict(), "ema": source.state_dict()}, tmp_path / "w.pt")
    load_weights(dsmoe, tmp_path / "w.pt")
    assert equal(dsmoe, source)


def test_weights_are_converted_to_the_models_dtype(dsmoe, source, tmp_path):
    save_file({name: value.half() for name, value in source.state_dict().items()}, tmp_path / "w.safetensors")
    load_weights(dsmoe, tmp_path / "w.safetensors")
    assert dsmoe.x_embedder.proj.weight.dtype == torch.float32
    torch.testing.assert_close(dsmoe.x_embedder.proj.weight, source.x_embedder.proj.weight, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("name", ["gone.safetensors", "gone.pt", "./a/b", "org/gone.safetensors"])
def test_missing_file(unchanged, name):
    with pytest.raises(WeightsError, match="no weights file at"):
        load_weights(unchanged, name)


def test_folder(unchanged, tmp_path):
    with pytest.raises(WeightsError, match="is a folder"):
        load_weights(unchanged, tmp_path)


def test_unknown_suffix(unchanged, tmp_path):
    (tmp_path / "w.ckpt").write_bytes(b"x")
    with pytest.raises(WeightsError, match=r"unknown weights format '\.ckpt'"):
        load_weights(unchanged, tmp_path / "w.ckpt")


def test_truncated_safetensors(unchanged, source, tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(source.state_dict(), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsError, match=r"w\.safetensors is no readable safetensors file"):
        load_weights(unchanged, path)


def test_truncated_torch_file(unchanged, source, tmp_path):
    path = tmp_path / "w.pt"
    torch.save(source.state_dict(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(WeightsError, match=r"w\.pt is no readable torch weights file"):
        load_weights(unchanged, path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_garbage(unchanged, tmp_path, suffix):
    path = tmp_path / f"w{suffix}"
    path.write_bytes(b"not weights at all" * 10)
    with pytest.raises(WeightsError, match="no readable"):
        load_weights(unchanged, path)


class Payload:
    """Runs code when it is unpickled carelessly."""

    def __reduce__(self):
        return (pytest.fail, ("a weights file executed code",))


@pytest.mark.parametrize("writer", [torch.save, lambda item, path: path.write_bytes(pickle.dumps(item, protocol=2))])
def test_files_with_code_are_refused(unchanged, tmp_path, writer):
    path = tmp_path / "w.pt"
    writer({"model": Payload()}, path)
    with pytest.raises(WeightsError, match="arbitrary Python objects are refused"):
        load_weights(unchanged, path)


@pytest.mark.parametrize("content", [{"optimizer": {"lr": 1.0}}, [torch.zeros(2)], {}])
def test_no_state_dict_inside(unchanged, tmp_path, content):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="holds no state dict"):
        load_weights(unchanged, tmp_path / "w.pt")


def test_wrong_shape(unchanged, source, tmp_path):
    state = dict(source.state_dict())
    state["blocks.1.mlp.gate.weight"] = torch.zeros(7, 32)
    torch.save(state, tmp_path / "w.pt")
    for strict in (True, False):
        with pytest.raises(
            WeightsError, match=r"w\.pt .* wrong shapes: blocks\.1\.mlp\.gate\.weight .*\[6, 32\].*\[7, 32\]"
        ):
            load_weights(unchanged, tmp_path / "w.pt", strict=strict)


def test_missing_and_unexpected_keys(unchanged, source, tmp_path):
    state = dict(source.state_dict())
    state["extra.weight"] = state.pop("final_layer.linear.bias")
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(
        WeightsError, match=r"1 missing keys: final_layer\.linear\.bias; 1 unexpected keys: extra\.weight"
    ):
        load_weights(unchanged, tmp_path / "w.pt")


def test_lenient_loading_copies_what_fits(dsmoe, source, tmp_path):
    state = dict(source.state_dict())
    del state["final_layer.linear.bias"]
    kept = dsmoe.final_layer.linear.bias.clone()
    torch.save(state | {"extra": torch.zeros(1)}, tmp_path / "w.pt")
    load_weights(dsmoe, tmp_path / "w.pt", strict=False)
    assert torch.equal(dsmoe.final_layer.linear.bias, kept)
    assert torch.equal(dsmoe.final_layer.linear.weight, source.final_layer.linear.weight)


def test_lenient_loading_refuses_a_file_with_nothing_in_common(unchanged, tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="none of the model's"):
        load_weights(unchanged, tmp_path / "w.pt", strict=False)


def test_long_lists_are_cut(unchanged, tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"and [0-9]+ more"):
        load_weights(unchanged, tmp_path / "w.pt")


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for huggingface_hub whose download is set by the test."""
    module = ModuleType("huggingface_hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return module


@pytest.mark.parametrize(("identifier", "filename"), [("org/name", "model.safetensors"), ("org/name:w.pt", "w.pt")])
def test_hub(dsmoe, source, tmp_path, hub, identifier, filename):
    path = tmp_path / filename
    if path.suffix == ".pt":
        torch.save(source.state_dict(), path)
    else:
        save_file(source.state_dict(), path)
    asked = []

    def hf_hub_download(repo_id, filename):
        asked.append((repo_id, filename))
        return str(path)

    hub.hf_hub_download = hf_hub_download
    load_weights(dsmoe, identifier)
    assert asked == [("org/name", filename)]
    assert equal(dsmoe, source)


def test_hub_unreachable(unchanged, hub):
    def hf_hub_download(repo_id, filename):
        raise ConnectionError("offline")

    hub.hf_hub_download = hf_hub_download
    with pytest.raises(WeightsError, match=r"could not fetch 'w\.pt' from hub repository 'org/name' .*offline"):
        load_weights(unchanged, "org/name:w.pt")


def test_hub_package_missing(unchanged, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"moeca_fx\[hub\]"):
        load_weights(unchanged, "org/name")
