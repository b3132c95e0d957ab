"""TARGET: what is accepted, and one clear error for everything else."""

import sys

import pytest
import torch

from moeca_fx import zoo
from moeca_fx.cli.target import load_target
from moeca_fx.errors import TargetError


def test_a_zoo_name_gives_its_model_and_inputs(project):
    loaded = load_target("digits", batch=3)
    assert isinstance(loaded.model, zoo.DSMoE)
    assert [tensor.shape[0] for tensor in loaded.inputs] == [3, 3, 3]
    assert loaded.kwargs == {}


def test_a_factory_of_a_zoo_model_needs_no_inputs(project):
    loaded = load_target("tiny_models:tiny", batch=5)
    assert loaded.inputs[0].shape == (5, 1, 8, 8)


def test_a_factory_may_take_the_batch(project):
    assert load_target("tiny_models:tiny_batch", batch=4).inputs[1].shape == (4,)


def test_the_working_folder_is_importable_only_while_loading(project):
    before = list(sys.path)
    load_target("tiny_models:tiny")
    assert sys.path == before


def test_weights_are_loaded_into_a_factory_model(project):
    donor = load_target("tiny_models:tiny").model
    state = {name: torch.full_like(tensor, 0.5) for name, tensor in donor.state_dict().items()}
    torch.save(state, "half.pt")
    loaded = load_target("tiny_models:tiny", weights="half.pt").model
    assert all((tensor == 0.5).all() for tensor in loaded.state_dict().values())


@pytest.mark.parametrize(
    ("target", "parts"),
    [
        ("digitz", ["digitz", "did you mean digits", "package.module:factory"]),
        ("no/such/thing", ["no/such/thing", "known models: "]),
        (":tiny", ["package.module:factory", "both sides"]),
        ("tiny_models:", ["both sides"]),
        ("nobody_has_this:tiny", ["importing nobody_has_this failed", "ModuleNotFoundError"]),
        ("broken_module:tiny", ["importing broken_module failed", "a_package_nobody_has"]),
        ("tiny_models:tinny", ["no attribute 'tinny'; it offers: Parallel, a_number", "tiny_batch"]),
        ("tiny_models:constant", ["expected a function", "found int"]),
        ("tiny_models:failing", ["the factory failed", "RuntimeError: out of luck"]),
        ("tiny_models:a_number", ["found int"]),
        ("tiny_models:bare_linear", ["Linear without inputs", "(model, example_inputs)"]),
    ],
)
def test_a_bad_target_is_refused_with_its_reason(project, target, parts):
    with pytest.raises(TargetError) as caught:
        load_target(target)
    for part in parts:
        assert part in str(caught.value)


def test_the_command_turns_it_into_exit_code_2(refuse):
    for command in ("inspect", "sample"):
        assert "no zoo model is called 'digitz'" in refuse(command, "digitz")
