"""capture: a trace equal to the model bit for bit, on inputs it was not made from, or a clear error."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from moeca_fx.batch import at_least_two, batch_size
from moeca_fx.discover import discover
from moeca_fx.errors import CaptureError, InputError
from moeca_fx.passes.capture import capture
from tests.helpers import zoo_models
from tests.helpers.passes import Stage, count_ops
from tests.helpers.toys import POOL, Blend, Quarry, Toy, toy, toy_inputs

marker = torch.ops.moeca.experts.default


@pytest.mark.parametrize("batch", [1, 3, 5])
@pytest.mark.parametrize("seed", [1, 2])
def test_bit_equal_on_other_inputs_and_batches(toy_stage: Stage, batch: int, seed: int) -> None:
    inputs = toy_inputs(batch, seed=seed, clock=0.7)
    with torch.no_grad(), toy_stage.live():
        (found,) = toy_stage.captured.module(*inputs)
        assert torch.equal(found, toy_stage.model(*inputs))


@pytest.mark.parametrize("batch", [1, 4])
def test_bit_equal_for_a_zoo_model_with_constants_in_its_result(dsmoe_stage: Stage, batch: int) -> None:
    inputs = zoo_models.inputs(batch, seed=5, t=0.3)
    with torch.no_grad(), dsmoe_stage.live():
        found, expected = dsmoe_stage.captured.module(*inputs), dsmoe_stage.model(*inputs)
    assert torch.equal(found[0], expected[0]) and found[1:] == expected[1:]


def test_each_region_is_one_marker(toy_stage: Stage) -> None:
    module = toy_stage.captured.module
    assert count_ops(module, marker) == 2
    keys = [node.args[3] for node in module.graph.find_nodes(op="call_function", target=marker)]
    assert [toy_stage.captured.regions[key].path for key in keys] == [f"storeys.{i}.layer.quarry" for i in (0, 1)]


def test_the_model_is_itself_again() -> None:
    model = toy()
    before = {path: sorted(vars(module)) for path, module in model.named_modules()}
    expected = model(*toy_inputs(seed=4))
    capture(model, discover(model, toy_inputs(), {}).regions, toy_inputs(), {})
    assert {path: sorted(vars(module)) for path, module in model.named_modules()} == before
    assert torch.equal(model(*toy_inputs(seed=4)), expected)


def test_a_region_that_was_not_marked_is_in_the_trace_as_an_error() -> None:
    with pytest.raises(CaptureError, match=r"torch\.export could not trace Toy"):
        capture(toy(), (), toy_inputs(), {})


class Fork(nn.Module):
    """Branches in Python on what it computes."""

    def forward(self, z: Tensor) -> Tensor:
        return z + 1 if float(z.sum()) > 0 else z - 1


class PythonCounter(nn.Module):
    """Counts its calls in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, z: Tensor) -> Tensor:
        self.calls += 1
        return z * self.calls


class Noisy(nn.Module):
    """Draws noise at every call."""

    def forward(self, z: Tensor) -> Tensor:
        return z + 0.1 * torch.randn_like(z)


@pytest.mark.parametrize(
    ("finish", "message"),
    [
        (Fork, "could not trace Toy.*data-dependent Python outside a proven"),
        (PythonCounter, "differs from Toy by .* expected equality bit for bit; the model may hold state"),
        (Noisy, "differs from Toy by .* expected equality bit for bit; the model may hold state, dropout"),
    ],
)
def test_models_that_no_trace_can_stand_for(finish: Callable[[], nn.Module], message: str) -> None:
    model = toy(finish=finish)
    before = {path: sorted(vars(module)) for path, module in model.named_modules()}
    regions = discover(model, toy_inputs(), {}).regions
    with pytest.raises(CaptureError, match=message):
        capture(model, regions, toy_inputs(), {})
    assert {path: sorted(vars(module)) for path, module in model.named_modules()} == before


class ManyResults(Toy):
    """Takes a dict and a keyword, returns a nest of things."""

    def forward(self, given: dict[str, Tensor], *, clock: Tensor, scale: float = 1.0) -> dict[str, object]:  # type: ignore[override]
        out = super().forward(given["grid"], clock)
        return {"out": out * scale, "more": [out[:, 0], None, "text"], "flag": True}


def test_structured_inputs_and_results() -> None:
    torch.manual_seed(0)
    model = ManyResults(Blend, height=1).eval()
    grid, clock = toy_inputs()
    kwargs = {"clock": clock, "scale": 2.0}
    captured = capture(model, discover(model, ({"grid": grid},), kwargs).regions, ({"grid": grid},), kwargs)
    assert captured.out_spec.num_leaves == 5
    assert captured.in_spec.num_leaves == 3


class Rebuilt(Quarry):
    """Rebuilds what it routes on from its arguments, by keyword and with a default."""

    def forward(self, grains: Tensor, which: Tensor, share: Tensor) -> Tensor:
        return self.cut(which=which, grains=grains, share=share)

    def cut(self, grains: Tensor, which: Tensor, share: Tensor, pool: int = POOL) -> Tensor:
        total = torch.zeros_like(grains)
        for number in range(pool):
            row, place = torch.where(which == number)
            if row.numel():
                total.index_add_(0, row, self.stones[number](grains[row]) * share[row, place, None])
        return total


def test_regions_called_by_keyword_with_defaults() -> None:
    model = toy(lambda: Blend(Rebuilt))
    captured = capture(model, discover(model, toy_inputs(), {}).regions, toy_inputs(), {})
    assert count_ops(captured.module, marker) == 1


def test_a_batch_of_one_is_doubled() -> None:
    x, label = torch.randn(1, 3), torch.tensor(4)
    (doubled, scalar), kwargs = at_least_two((x, label), {"w": torch.ones(1)})
    assert doubled.shape == (2, 3) and scalar is label and kwargs["w"].shape == (2,)
    assert at_least_two((torch.randn(2, 3),), {})[0][0].shape == (2, 3)


def test_inputs_without_a_batch() -> None:
    with pytest.raises(InputError, match="at least one tensor with a leading batch dimension"):
        batch_size((1, torch.tensor(2.0)), {})
