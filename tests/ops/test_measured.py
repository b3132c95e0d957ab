"""The measurement that decides whether a library's operation is replaced."""

import pytest
import torch

from moeca_fx.ops import measured


def test_runs_take_turns_and_their_ratios_count(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([1.0, 2.0, 10.0, 20.0, 3.0, 1.0])  # the machine slowed down and one run was disturbed
    monkeypatch.setattr(measured, "REPEATS", 3)
    monkeypatch.setattr(measured, "_seconds", lambda run: next(seconds))
    assert measured.share_of_time(lambda: torch.empty(0), lambda: torch.empty(0)) == 0.5
