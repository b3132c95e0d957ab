"""Tapes hold what a call computed with every write as a new value; recipes hold what is true for any batch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moeca_fx.discover.inline.recipe import Recipe, make_recipe
from moeca_fx.discover.inline.tape import NotReplayable, Ref, Tape, depends_on, record

aten = torch.ops.aten
WIDTH = 6


class Middle(nn.Module):
    """What stands for the routed experts."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 + 1


class Around(nn.Module):
    """A call with something before, `Middle`, and something after that tests choose."""

    def __init__(self, before: Callable[[nn.Module, Tensor], Tensor], after: Callable[..., Any]) -> None:
        super().__init__()
        self.linear, self.middle = nn.Linear(WIDTH, WIDTH), Middle()
        self.register_buffer("table", torch.arange(float(WIDTH)))
        object.__setattr__(self, "before", before)
        object.__setattr__(self, "after", after)

    def forward(self, x: Tensor) -> Any:
        return self.after(self, x, self.middle(self.before(self, x)))


def _plain(_module: nn.Module, x: Tensor) -> Tensor:
    return x


def _sum(_module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return x + y


def _recipe(module: nn.Module) -> Recipe:
    torch.manual_seed(3)
    tapes = [record(module, frozenset(), (torch.randn(batch, 4, WIDTH),), {}) for batch in (2, 4)]
    return make_recipe(*tapes, *_around_middle(tapes[0]))


def _around_middle(tape: Tape) -> tuple[list[int], int]:
    (entry,) = [entry for entry in tape.entries if entry.target == "middle"]
    return entry.reads(), int(entry.outputs[0] or 0)


def _check_replay(module: nn.Module) -> Recipe:
    recipe = _recipe(module)
    for batch in (1, 3, 8):
        x = torch.randn(batch, 4, WIDTH)
        with torch.no_grad():
            expected = module(x)
            found = recipe.run(module, Middle(), (x,), {})
        assert torch.equal(found, expected)
    return recipe


def _rows_and_writes(module: nn.Module, x: Tensor) -> Tensor:
    rows = x.reshape(-1, WIDTH)
    out = torch.zeros(rows.shape[0], WIDTH)
    out.index_add_(0, torch.arange(rows.shape[0]), rows)
    out[0].mul_(3)  # through a view
    out.view(-1)[:WIDTH] += 1
    out[:, 1] = rows[:, 0]
    out.relu_().clamp_(max=2.0)
    return out.view(x.shape) + module.get_buffer("table")


def _linears_and_norms(module: nn.Module, x: Tensor) -> Tensor:
    linear = module.get_submodule("linear")
    weight, bias = linear.get_parameter("weight"), linear.get_parameter("bias")
    normed = nn.functional.layer_norm(x, (WIDTH,))
    return nn.functional.linear(normed, weight, bias) + nn.functional.linear(x[:, 0], weight)[:, None] + linear(x)


@pytest.mark.parametrize("before", [_plain, _rows_and_writes, _linears_and_norms])
def test_what_is_recorded_replays_for_any_batch(before: Callable[[nn.Module, Tensor], Tensor]) -> None:
    _check_replay(Around(before, _sum))


def test_composites_are_whole_again() -> None:
    recipe = _check_replay(Around(_linears_and_norms, _sum))
    targets = [entry.target for entry in recipe.before]
    assert targets.count(aten.linear.default) == 2 and targets.count(aten.layer_norm.default) == 1
    assert "linear" in targets and aten.t.default not in targets and aten.addmm.default not in targets


def test_writes_after_the_middle() -> None:
    def after(_module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        y[:, 1].add_(x[:, 0])
        return y

    _check_replay(Around(_plain, after))


def test_results_of_any_structure() -> None:
    def after(_module: nn.Module, x: Tensor, y: Tensor) -> dict[str, Any]:
        return {"rows": (x + y).flatten(0, 1), "more": [y.sum(), None, 3]}

    module = Around(_plain, after)
    recipe, x = _recipe(module), torch.randn(5, 4, WIDTH)
    with torch.no_grad():
        expected, found = module(x), recipe.run(module, Middle(), (x,), {})
    assert torch.equal(found["rows"], expected["rows"]) and torch.equal(found["more"][0], expected["more"][0])
    assert found["more"][1:] == [None, 3] and found["rows"].shape[0] == 20


def _reads_a_number(_module: nn.Module, x: Tensor) -> Tensor:
    return x * float(x.sum())


def _reads_an_array(_module: nn.Module, x: Tensor) -> Tensor:
    return x + torch.from_numpy(x.mean((0, 1)).numpy().copy())


def _sizes_from_data(_module: nn.Module, x: Tensor) -> Tensor:
    return x + x[x > 0].sum()


def _random(_module: nn.Module, x: Tensor) -> Tensor:
    return x + torch.randn_like(x)


def _length_from_data(_module: nn.Module, x: Tensor) -> Tensor:
    return x + x[:, : 1 + int(x.abs().sum()) % 3].sum(1, keepdim=True)


REFUSED: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], str]] = {
    "a number": (_reads_a_number, "depends on data"),
    "an array": (_reads_an_array, "outside of torch"),
    "a selection": (_sizes_from_data, "sizes from data"),
    "noise": (_random, "random numbers"),
}


@pytest.mark.parametrize(("before", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_depends_on_data_has_no_recipe(before: Callable[[nn.Module, Tensor], Tensor], reason: str) -> None:
    with pytest.raises(NotReplayable, match=reason):
        _recipe(Around(before, _sum))


@pytest.mark.parametrize("before", [_reads_a_number, _reads_an_array, _sizes_from_data, _random, _length_from_data])
def test_what_depends_on_data_may_stand_behind_the_middle(before: Callable[[nn.Module, Tensor], Tensor]) -> None:
    """Only what is on the way counts: experts may be dispatched to in any way."""

    def after(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        before(module, x)
        return x + y

    _check_replay(Around(_plain, after))


def _writes_its_argument(_module: nn.Module, x: Tensor) -> Tensor:
    return x.mul_(2)


def _writes_a_weight(module: nn.Module, x: Tensor) -> Tensor:
    module.get_buffer("table").add_(1)
    return x


@pytest.mark.parametrize("before", [_writes_its_argument, _writes_a_weight])
def test_writes_outside_are_refused(before: Callable[[nn.Module, Tensor], Tensor]) -> None:
    with pytest.raises(NotReplayable, match="argument or a weight"):
        _recipe(Around(before, _sum))


class WritesItsInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)


@dataclass
class Packed:
    value: Tensor


class ReturnsAnObject(nn.Module):
    def forward(self, x: Tensor) -> Packed:
        return Packed(x + 1)


@pytest.mark.parametrize(
    ("inner", "reason"), [(WritesItsInput(), "writes into its arguments"), (ReturnsAnObject(), "returns a Packed")]
)
def test_submodules_that_cannot_be_one_entry(inner: nn.Module, reason: str) -> None:
    def before(module: nn.Module, x: Tensor) -> Tensor:
        made = module.get_submodule("inner")(x * 1)
        return made.value if isinstance(made, Packed) else made  # type: ignore[no-any-return]

    module = Around(before, _sum)
    module.add_module("inner", inner)
    with pytest.raises(NotReplayable, match=reason):
        _recipe(module)


def test_nothing_stays_behind() -> None:
    module = Around(_rows_and_writes, _sum)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    x = torch.randn(2, 4, WIDTH)
    with torch.no_grad():
        expected = module(x)
        tape = record(module, frozenset(), (x,), {})
    assert all(not part._forward_hooks and not part._forward_pre_hooks for part in module.modules())
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    (result,) = tape.outputs
    assert isinstance(result, Ref) and torch.equal(tape.values[result.number], expected)


def test_values_that_submodules_and_parameters_have_a_part_in() -> None:
    module = Around(_linears_and_norms, _sum)
    tape = record(module, frozenset(), (torch.randn(2, 4, WIDTH),), {})
    middle = next(entry for entry in tape.entries if entry.target == "middle")
    last = tape.entries[-1].outputs[0]
    assert depends_on(tape, frozenset({"middle"}), frozenset()) == {middle.outputs[0], last}
    behind_weight = depends_on(tape, frozenset(), frozenset({"linear.weight"}))
    assert {middle.outputs[0], last} <= behind_weight and not behind_weight >= set(tape.entries[0].outputs)
