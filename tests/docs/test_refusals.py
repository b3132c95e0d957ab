"""The documented refusals are the package's, and every refusal in its source carries one of them."""

import ast
import importlib.util
import pickle
from pathlib import Path

import pytest

import moeca_fx
from moeca_fx import errors
from moeca_fx.reasons import Reason
from tests.discover import layers
from tests.helpers.toys import toy, toy_inputs

ROOT = Path(__file__).resolve().parents[2]
REFUSING = {"NotReplayable", "UnprovenRegionError", "NoMoEFoundError", "UnsupportedModelError", "CaptureError"}


def test_the_page_is_the_list():
    script = ROOT / "docs" / "update_refusals.py"
    spec = importlib.util.spec_from_file_location("update_refusals", script)
    update = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(update)
    assert update.PAGE.read_text() == update.page()
    assert all(f"| `{reason}` |" in update.page() for reason in Reason)


def _raised(path):
    """Calls that make an error of a refusing class, of one file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in REFUSING:
            yield node


def test_every_refusal_in_the_source_has_a_reason():
    calls = 0
    for folder in ("discover", "passes", "graph", "registry"):
        for path in (ROOT / "moeca_fx" / folder).rglob("*.py"):
            for call in _raised(path):
                calls += 1
                named = [keyword.arg for keyword in call.keywords]
                assert "code" in named or len(call.args) == 2, f"{path.name}:{call.lineno}"
    assert calls > 30


def test_every_reason_is_given_somewhere():
    source = "\n".join(path.read_text() for path in (ROOT / "moeca_fx").rglob("*.py") if path.name != "reasons.py")
    assert [reason.name for reason in Reason if f"Reason.{reason.name}" not in source] == []


def test_every_reason_names_an_error_class():
    assert all(issubclass(getattr(errors, reason.error), errors.MoecaError) for reason in Reason)


def test_the_most_telling_reason_is_the_first_listed():
    assert Reason.most_telling([Reason.NO_ROUTER, None, Reason.WEIGHTS_OFF]) is Reason.WEIGHTS_OFF
    assert Reason.most_telling([None]) is None


def test_a_refusal_carries_the_code_of_what_tells_most_and_the_text_of_all():
    with pytest.raises(errors.UnprovenRegionError) as caught:
        moeca_fx.transform(toy(layers.CalledTwice), toy_inputs())
    assert caught.value.code is Reason.CALLED_AGAIN
    assert "called 2 times in one forward" in str(caught.value)


def test_codes_survive_pickling():
    error = pickle.loads(pickle.dumps(errors.CaptureError("what", code=Reason.NOT_TRACEABLE)))
    assert (str(error), error.code) == ("what", Reason.NOT_TRACEABLE)
    assert errors.ConfigError("what").code is None
