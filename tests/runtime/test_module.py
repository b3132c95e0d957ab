"""The transformed model behaves like the original, shares its weights, and leaves it as it was."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moeca_fx
from moeca_fx import MoECa
from moeca_fx.errors import ConfigError, UnsupportedModelError
from moeca_fx.runtime.module import TransformedModel
from tests.helpers import zoo_models
from tests.helpers.grids import slow
from tests.helpers.toys import Toy, toy, toy_inputs
from tests.helpers.transformed import SOME, run, toy_pair, zoo_pair
from tests.helpers.zoo_models import prediction, relative_error


def _storages(*models: nn.Module) -> dict[int, int]:
    """Bytes of every distinct storage."""
    tensors = [t for model in models for t in (*model.parameters(), *model.buffers())]
    for model in models:
        if isinstance(model, TransformedModel):
            for program in model._moeca.programs.values():
                graphs = program.graphs.modules().values() if program.graphs is not None else ()
                for module in (program.plain, *graphs):
                    tensors += [*module.parameters(), *module.buffers()]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def _surface(model: nn.Module) -> list[Any]:
    return [(path, type(m), sorted(vars(m)), m.training) for path, m in model.named_modules()]


def test_the_original_is_untouched() -> None:
    model = zoo_models.tiny_dsmoe(depth=2)
    inputs = zoo_models.inputs()
    with torch.no_grad():
        expected = prediction(model(*inputs))
    surface = _surface(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    identity = [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
    size = sum(_storages(model).values())
    fast = moeca_fx.transform(model, inputs)
    run(fast, list(zoo_models.trajectory(steps=3)))
    assert _surface(model) == surface
    assert [(name, id(p), p.requires_grad) for name, p in model.named_parameters()] == identity
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(prediction(model(*inputs)), expected)
    assert sum(_storages(model).values()) == size
    # Both models, and every graph of the transformed one, live in the original's memory.
    assert sum(_storages(model, fast).values()) <= 1.01 * size


def test_another_policy_on_the_same_trace() -> None:
    model, plain = zoo_pair("dsmoe", None)
    steps = list(zoo_models.trajectory(steps=5))
    cached = plain.with_policy(SOME)
    expected = run(moeca_fx.transform(model, zoo_models.inputs(), policy=SOME), steps)
    for found in (run(cached, steps), run(cached.with_policy("fora").with_policy(SOME), steps)):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert cached.stats().cached_steps == 3 and type(cached).__name__ == type(model).__name__
    uncached = cached.with_policy(None)
    assert all(torch.equal(a, b) for a, b in zip(run(uncached, steps), run(plain, steps), strict=True))
    assert uncached.stats().full_steps == 5 and plain.stats().full_steps == 5


def test_models_under_other_policies_share_weights_and_nothing_else() -> None:
    model = zoo_models.tiny_dsmoe(depth=2)
    plain = moeca_fx.transform(model, zoo_models.inputs(), policy=None)
    cached = plain.with_policy(SOME)
    size = sum(_storages(model).values())
    assert sum(_storages(model, plain, cached).values()) <= 1.01 * size
    steps = list(zoo_models.trajectory(steps=3))
    run(cached, steps)
    assert not plain.memory().total and not plain.stats().cached_steps
    with torch.no_grad():
        model.final_layer.linear.weight.mul_(2)
    assert torch.equal(run(plain, steps)[0], run(cached.with_policy("fora"), steps)[0])
    before = [run(plain, steps)[0], run(plain.with_policy("fora"), steps)[0]]
    seer = plain.with_policy("fora")
    cached.to(torch.bfloat16)
    again = cached.with_policy(SOME)
    x, t, y = steps[0]
    assert prediction(again(x.bfloat16(), t.bfloat16(), y)).dtype == torch.bfloat16
    assert torch.equal(run(plain, steps)[0], before[0])
    plain.to(torch.bfloat16)
    assert torch.equal(run(seer, steps)[0], before[1])


def test_a_policy_that_does_not_fit_leaves_the_model_usable() -> None:
    _, fast = zoo_pair()
    with pytest.raises(ConfigError, match="policy"):
        fast.with_policy("no such policy")
    with pytest.raises(ConfigError):
        fast.with_policy(3)
    run(fast, list(zoo_models.trajectory(steps=2)))


def test_every_parameter_is_shared() -> None:
    model, fast = zoo_pair()
    ours = dict(fast.named_parameters())
    for name, parameter in model.named_parameters():
        assert ours[name] is not parameter
        assert ours[name].data_ptr() == parameter.data_ptr(), name
        assert ours[name].requires_grad == parameter.requires_grad


def test_a_second_transform_shares_too() -> None:
    model = toy()
    size = sum(_storages(model).values())
    fast = [moeca_fx.transform(model, toy_inputs(), policy=policy) for policy in (MoECa(), MoECa(interval=2))]
    assert sum(_storages(model, *fast).values()) <= 1.01 * size
    places = [p.data_ptr() for p in model.parameters()]
    for other in fast:
        assert [p.data_ptr() for p in other.parameters()] == places


def test_a_transformed_model_is_not_transformed_again() -> None:
    _, fast = toy_pair()
    for function in (moeca_fx.transform, moeca_fx.inspect, moeca_fx.estimate_memory):
        with pytest.raises(UnsupportedModelError, match="Toy: is transformed already; pass the original"):
            function(fast, toy_inputs())


def test_class_attributes_and_state_dict() -> None:
    model, fast = zoo_pair()
    assert isinstance(fast, type(model)) and isinstance(fast, TransformedModel)
    assert type(fast).__name__ == type(model).__name__ and not fast.training
    assert fast.config is not None and fast.config == model.config
    assert list(fast.state_dict()) == list(model.state_dict())
    assert [name for name, _ in fast.named_modules()] == [name for name, _ in model.named_modules()]
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in fast.state_dict().items())
    assert next(fast.parameters()).device == next(model.parameters()).device


def test_load_state_dict_on_either_is_seen_by_both() -> None:
    model, other = toy(), toy(seed=9)
    fast = moeca_fx.transform(model, toy_inputs(), policy=None)
    inputs = toy_inputs(seed=2)
    with torch.no_grad():
        expected = other(*inputs)
        assert not torch.allclose(fast(*inputs), expected)
        model.load_state_dict(other.state_dict())
        torch.testing.assert_close(fast(*inputs), expected)
        fast.load_state_dict(toy().state_dict())
        torch.testing.assert_close(model(*inputs), toy()(*inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, slow(torch.float64)], ids=str)
def test_cast_then_equal_to_the_cast_original(dtype: torch.dtype) -> None:
    class Cast(Toy):
        """Computes its embedding in the dtype of its weights."""

        def forward(self, grid: Tensor, clock: Tensor) -> Tensor:
            return super().forward(grid, clock.to(grid.dtype))

    torch.manual_seed(0)
    model = Cast().eval()
    fast = moeca_fx.transform(model, toy_inputs(), policy=MoECa(interval=2))
    run(fast, [toy_inputs(clock=0.1), toy_inputs(seed=1, clock=0.2)])
    assert fast.to(dtype) is fast
    assert fast.cache() == {} and next(fast.parameters()).dtype == dtype
    assert next(model.parameters()).dtype == torch.float32, "the original keeps its dtype"
    reference = copy.deepcopy(model).to(dtype)
    grid, clock = toy_inputs(seed=5)
    (found,) = run(fast, [(grid.to(dtype), clock)])
    with torch.no_grad():
        expected = reference(grid.to(dtype), clock)
    assert relative_error(found, expected) <= {torch.float64: 1e-12, torch.bfloat16: 4e-2}[dtype]
    run(fast, [(grid.to(dtype), clock + 0.1)])
    assert fast.stats().cached_steps == 1
    assert sum(_storages(fast).values()) <= 1.01 * sum(_storages(reference).values())


def test_deepcopy_is_a_model_of_its_own() -> None:
    model, fast = toy_pair(MoECa(interval=2))
    steps = [toy_inputs(clock=0.1), toy_inputs(seed=1, clock=0.2)]
    expected = run(fast, steps)
    twin = copy.deepcopy(fast)
    assert isinstance(twin, TransformedModel) and isinstance(twin, type(model))
    assert twin.cache() == {} and twin.stats().full_steps == 0
    assert not set(_storages(twin)) & set(_storages(model))
    found = run(twin, steps)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with torch.no_grad():
        next(twin.parameters()).zero_()
    assert not torch.equal(next(twin.parameters()), next(fast.parameters()))


@pytest.mark.parametrize("which", ["original", "transformed"])
def test_saved_state_dicts_load_again(which: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model, fast = toy_pair()
    source = model if which == "original" else fast
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    for loaded in (
        torch.load(tmp_path / "weights.pt", weights_only=True),
        load_file(tmp_path / "weights.safetensors"),
    ):
        fresh = toy(seed=7)
        fresh.load_state_dict(loaded, strict=True)
        with torch.no_grad():
            assert torch.equal(fresh(*toy_inputs()), model(*toy_inputs()))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_callers_in_any_gradient_mode(mode: Any) -> None:
    _, fast = toy_pair(MoECa(interval=2))
    steps = [toy_inputs(clock=0.1), toy_inputs(seed=1, clock=0.2), toy_inputs(seed=2, clock=0.3)]
    expected = run(fast, steps)
    fast.reset()
    with mode():
        found = [fast(*inputs) for inputs in steps[:2]]
    found.append(fast(*steps[2]))  # caches made in any mode serve a call in another
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not any(result.requires_grad for result in found)


def test_first_call_of_a_kind_inside_inference_mode() -> None:
    model = toy()
    with torch.inference_mode():
        inputs = toy_inputs()
        fast = moeca_fx.transform(model, inputs, policy=MoECa(interval=2))
        found = [fast(*inputs), fast(inputs[0], clock=inputs[1] + 0.1)]
        torch.testing.assert_close(found[0], model(*inputs))
    assert fast.stats().full_steps + fast.stats().cached_steps == 2


def test_keyword_calls() -> None:
    _, fast = toy_pair(MoECa(interval=2))
    grid, clock = toy_inputs(seed=1)
    (expected,) = run(fast, [(grid, clock)])
    with torch.no_grad():
        assert torch.equal(fast(grid=grid, clock=clock), expected)
        assert torch.equal(fast(clock=clock, grid=grid), expected)
        assert torch.equal(fast(grid, clock=clock), expected)


def test_keyword_examples_and_positional_calls() -> None:
    model = zoo_models.tiny_dsmoe()
    x, t, y = zoo_models.inputs()
    fast = moeca_fx.transform(model, (x,), {"y": y, "t": t}, policy=MoECa(interval=1))
    with torch.no_grad():
        expected = prediction(model(x, t, y))
        for found in (fast(x, t, y), fast(x, t=t, y=y), fast(x, y=y, t=t)):
            assert relative_error(prediction(found), expected) <= 1e-5


def test_training_mode_is_refused_at_the_call() -> None:
    model, fast = toy_pair()
    fast.train()
    try:
        assert not model.training
        with pytest.raises(UnsupportedModelError, match=r"Toy is in training mode.*call \.eval\(\)"):
            fast(*toy_inputs())
    finally:
        fast.eval()
    run(fast, [toy_inputs()])


class Telling(Toy):
    """Returns what a cache holds: the last attention output, and the layer's input."""

    def forward(self, grid: Tensor, clock: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        phase = clock[:, None] * self.pitch
        mood = torch.cat([phase.sin(), phase.cos()], dim=-1)
        storey = self.storeys[0]
        first, second = storey.valves(mood).unsqueeze(1).chunk(2, dim=-1)
        seen = storey.mixing(storey.level(grid))
        grid = grid + first * seen
        return grid + second * storey.layer(storey.level(grid)), seen


def test_results_are_the_callers_own() -> None:
    """What a call returned is not overwritten by later calls, also where it is a cached value."""
    torch.manual_seed(0)
    fast = moeca_fx.transform(Telling().eval(), toy_inputs(), policy=MoECa(interval=9, tau0=0.0))
    kept, copies = [], []
    for index in range(4):
        results = fast(*toy_inputs(seed=index, clock=0.1 * index))
        kept.append(results)
        copies.append(tuple(result.clone() for result in results))
    for results, expected in zip(kept, copies, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_what_the_caller_does_to_results_does_not_reach_the_caches() -> None:
    torch.manual_seed(0)
    fast = moeca_fx.transform(Telling().eval(), toy_inputs(), policy=MoECa(interval=9))
    steps = [toy_inputs(seed=index, clock=0.1 * index) for index in range(3)]
    expected = [tuple(r.clone() for r in fast(*inputs)) for inputs in steps]
    fast.reset()
    for inputs, want in zip(steps, expected, strict=True):
        results = fast(*inputs)
        assert all(torch.equal(a, b) for a, b in zip(results, want, strict=True))
        for result in results:
            result.zero_()


def test_a_move_that_changes_nothing_keeps_graphs_and_caches() -> None:
    fast = moeca_fx.transform(toy(), toy_inputs(), policy=MoECa())
    fast(*toy_inputs())
    program, held = fast._moeca.trajectories["default"].program, fast.cache()
    assert fast.to("cpu") is fast.float()
    assert fast._moeca.trajectories["default"].program is program
    assert all(fast.cache()[name] is tensor for name, tensor in held.items())
