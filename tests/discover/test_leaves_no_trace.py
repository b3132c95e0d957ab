"""Discovery looks and leaves: few forwards, no hooks, no attributes, also when the model raises in between."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moeca_fx.discover import discover
from moeca_fx.errors import InputError
from tests.helpers.toys import Blend, Mixing, Toy, toy_inputs


class Counting(Toy):
    """Counts its forwards, and fails at one of them."""

    forwards = 0

    def __init__(self, fails_at: int = 0) -> None:
        super().__init__(Blend, Mixing, height=2)
        object.__setattr__(self, "fails_at", fails_at)

    def forward(self, grid: Tensor, clock: Tensor) -> Tensor:
        type(self).forwards += 1
        out = super().forward(grid, clock)
        if 0 < self.fails_at <= type(self).forwards:
            raise RuntimeError("the model gave up")
        return out


def _surface(model: nn.Module) -> list[tuple[str, list[str], list[Any]]]:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return [
        (path, sorted(vars(module)), [dict(vars(module)[name]) for name in hooks])
        for path, module in model.named_modules()
    ]


@pytest.mark.parametrize("fails_at", [0, 1, 2])
def test_hooks_and_attributes_are_gone(fails_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Counting, "forwards", 0)
    torch.manual_seed(0)
    model = Counting(fails_at).eval()
    before = _surface(model)
    if fails_at:
        with pytest.raises((InputError, RuntimeError), match="the model gave up"):
            discover(model, toy_inputs(), {})
    else:
        assert len(discover(model, toy_inputs(), {}).regions) == 2
        assert Counting.forwards <= 3
    assert _surface(model) == before


def test_the_probe_does_not_change_results() -> None:
    torch.manual_seed(0)
    model = Toy(Blend, Mixing).eval()
    expected = model(*toy_inputs())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    discover(model, toy_inputs(), {})
    assert torch.equal(model(*toy_inputs()), expected)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
