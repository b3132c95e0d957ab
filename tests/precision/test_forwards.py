"""How often `transform` runs the model: three times to discover and prove; the rest is capture's."""

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

import moeca_fx
from moeca_fx import MoECa, passes
from tests.helpers.toys import Toy
from tests.precision.models import KINDS, Kind, inputs_of, model_of

MOST_TO_DISCOVER = 3  # two probe runs, and one with another first sample
TO_CAPTURE = {"method": 3, "block": 4, "stacked": 4}  # inputs that the trace is compared on, twice as many, the trace


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Forward passes of toys by stage of `transform`."""
    found: Counter[str] = Counter()
    stage = ["elsewhere"]
    original = Toy.forward

    def counted(self: Toy, *args: Any) -> Any:
        found[stage[-1]] += 1
        return original(self, *args)

    def entered(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            stage.append(name)
            try:
                return function(*args, **kwargs)
            finally:
                stage.pop()

        return run

    monkeypatch.setattr(Toy, "forward", counted)
    module = sys.modules["moeca_fx.transform"]  # the package's attribute of this name is the function
    monkeypatch.setattr(module, "find_regions", entered("discover", module.find_regions))
    monkeypatch.setattr(passes, "capture", entered("capture", passes.capture))
    return found


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_forwards_of_transform(kind: Kind, batch: int, forwards: Counter[str]) -> None:
    moeca_fx.transform(model_of(kind, height=2), inputs_of(batch=batch), policy=MoECa(), compile=False)
    assert forwards == {"discover": MOST_TO_DISCOVER, "capture": TO_CAPTURE[kind]}


def test_forwards_where_evidence_is_thin(forwards: Counter[str]) -> None:
    """More calls of single layers, not of the model."""
    model = model_of("block")
    moeca_fx.transform(model, inputs_of(batch=1, tokens=2), policy=None, compile=False)
    assert forwards["discover"] <= MOST_TO_DISCOVER
