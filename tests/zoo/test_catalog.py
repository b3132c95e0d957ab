"""Building by name, example inputs, and what importing costs."""

import subprocess
import sys

import pytest
import torch

import moeca_fx.zoo as zoo
from moeca_fx.errors import InputError, TargetError, WeightsError
from moeca_fx.zoo import catalog


def test_names_list_every_published_size_and_the_trained_models():
    assert set(zoo.names()) == {
        "dsmoe-s-e16",
        "dsmoe-s-e48",
        "dsmoe-b-e16",
        "dsmoe-b-e48",
        "dsmoe-l-e16",
        "dsmoe-l-e48",
        "dsmoe-3b-e16",
        "dit-moe-s",
        "dit-moe-b",
        "dit-moe-xl",
        "dit-moe-g",
        "digits",
        "glyphs",
    }


def test_built_models_are_seeded_and_in_eval_mode():
    one, same, other = (zoo.build("dsmoe-s-e16", seed=seed) for seed in (3, 3, 4))
    assert not any(module.training for module in one.modules())
    weight = "blocks.1.mlp.experts.blocks.7.up_proj.weight"
    assert torch.equal(one.get_parameter(weight), same.get_parameter(weight))
    assert not torch.equal(one.get_parameter(weight), other.get_parameter(weight))


def test_randomising_neither_reads_nor_moves_the_global_generator():
    def tiny():
        return zoo.DSMoE(zoo.DSMoEConfig(depth=2, num_experts=6, expert_width=8))

    one, other = tiny(), tiny()
    torch.manual_seed(0)
    zoo.randomize_(one, seed=5)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(0)))
    zoo.randomize_(other, seed=5)
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_an_unknown_name_lists_near_ones():
    with pytest.raises(TargetError, match="dsmoe-s-e48"):
        zoo.build("dsmoe-s-e47")
    with pytest.raises(TargetError, match="known models: dsmoe-s-e16"):
        zoo.build("???")


@pytest.mark.parametrize("name", ["dsmoe-s-e16", "dit-moe-s", "digits", "glyphs"])
def test_example_inputs_fit_by_name(name):
    x, t, y = zoo.example_inputs(name, batch=5, seed=1)
    assert x.shape[0] == t.shape[0] == y.shape[0] == 5
    assert x.shape[1:] == {"digits": (1, 8, 8), "glyphs": (1, 32, 32)}.get(name, (4, 32, 32))
    assert y.dtype == torch.int64 and y.max() < {"digits": 10, "glyphs": 62}.get(name, 1000)
    assert (t < 1).all() if name != "dit-moe-s" else torch.equal(t, t.floor())
    assert torch.equal(x, zoo.example_inputs(name, batch=5, seed=1)[0])
    assert not torch.equal(x, zoo.example_inputs(name, batch=5, seed=2)[0])


def test_example_inputs_refuse_strangers():
    with pytest.raises(InputError, match="zoo models only"):
        zoo.example_inputs(torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="at least 1"):
        zoo.example_inputs("digits", batch=0)


@pytest.mark.parametrize("name", ["digits", "glyphs"])
def test_missing_trained_weights_are_an_error_and_never_random_ones(name, monkeypatch, tmp_path):
    monkeypatch.setitem(catalog.TRAINED, name, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=rf"{name}.*expected at .*w\.safetensors.*clone .*--model {name}"):
        zoo.build(name)


def test_the_zoo_has_no_other_attributes():
    with pytest.raises(AttributeError, match="nonsense"):
        _ = zoo.nonsense
    assert {"build", "DSMoE"} <= set(dir(zoo))


def test_importing_and_building_needs_no_extra_package():
    """A fresh interpreter in which the extras cannot be imported still builds and runs a DSMoE."""
    program = """
import sys
for name in ("safetensors", "sklearn", "rich", "typer", "torchmetrics", "PIL", "huggingface_hub"):
    sys.modules[name] = None
import torch, moeca_fx.zoo as zoo
model = zoo.build("dsmoe-s-e16")
with torch.no_grad():
    assert model(*zoo.example_inputs(model, batch=1))[0].isfinite().all()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
