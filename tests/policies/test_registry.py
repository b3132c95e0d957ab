"""Methods by name and by file; what a wrong file says."""

from pathlib import Path

import pytest

import moeca_fx
from moeca_fx import policies
from moeca_fx.errors import ConfigError
from tests.helpers.toys import toy, toy_inputs


def test_names() -> None:
    assert {"moeca", "fora", "toca", "duca", "teacache", "taylorseer", "dbcache", "forecast"} <= set(policies.names())


def test_transform_takes_a_name_and_a_file(tmp_path: Path) -> None:
    path = tmp_path / "fora.yaml"
    policies.save(policies.build("fora", interval=2), path)
    for policy in ("fora", path, str(path)):
        fast = moeca_fx.transform(toy(), toy_inputs(), policy=policy)
        assert fast._moeca.policy is not None and fast._moeca.policy.label == "sublayer"


def test_the_default_is_moeca_as_published() -> None:
    fast = moeca_fx.transform(toy(), toy_inputs())
    assert fast._moeca.policy == moeca_fx.MoECa().policy()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("policy: fura", "no policy is called 'fura'; did you mean fora"),
        ("policy: zzzzzz", "known policies: "),
        ("policy: fora\nintervall: 3", "has no field 'intervall'; its fields are interval"),
        ("policy: moeca\nname: my run", "has no field 'name'"),
        ("policy: fora\ninterval: four", "found 'four'"),
        ("policy: fora\ninterval: 0", "expected an integer >= 1"),
        ("policy: fora\ninterval: 2.5", "found 2.5"),
        ("policy: fora\ninterval: true", "found True"),
        ("policy: toca", "expected the field steps"),
        ("policy: moeca\ntau0: .inf", "finite"),
        ("policy: moeca\nattention: sometimes", "one of 'synchronized'"),
        ("policy: calibrated\nsteps: 4\nfull: [0, 1]\nweights: [[2, [1.0]]]", "for each of the 2 steps"),
        ("policy: calibrated\nsteps: 4\nfull: [0, 1]\nweights: none", "tuple[tuple[int, tuple[float"),
        ("policy: calibrated\nsteps: '4'\nfull: [0]\nweights: []", "Calibrated.steps: expected an integer, found '4'"),
        ("policy: calibrated\nsteps: 4\nfull: 3\nweights: []", "Calibrated.full: expected tuple[int, ...], found 3"),
        ("policy: calibrated\nsteps: 2\nfull: [0]\nweights: [[1, [.nan]]]", "Calibrated.weights"),
        ("policy: teacache\nsteps: 4\ncoefficients: 3", "TeaCache.coefficients: expected tuple[float, ...]"),
        ("policy: branch_forecast\nselect: score\ntau0: high", "BranchForecast.tau0: expected a finite number"),
        ("policy: branch_forecast\nselect: score\ntau0: -5", "tau0: expected a finite number >= 0"),
        ("policy: branch_forecast\norder: 0\nselect: error_budget", "order 0 forecasts nothing"),
        ("policy: taylorseer\norder: 6", "TaylorSeer.order: expected an integer >= 0 and <= 4"),
        ("interval: 4", "mapping with the key 'policy'"),
        ("- fora", "mapping with the key 'policy', found list"),
        ("", "found NoneType"),
        ("policy: [", "expected a YAML file"),
    ],
)
def test_wrong_files(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        policies.load(path)
    assert str(path) in str(caught.value) and message in str(caught.value)


def test_a_missing_file() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read"):
        moeca_fx.transform(toy(), toy_inputs(), policy="nowhere.yaml")


def test_a_model_without_a_token_grid() -> None:
    with pytest.raises(moeca_fx.errors.UnsupportedModelError, match="square token grid"):
        moeca_fx.transform(toy(), toy_inputs(), policy=policies.build("toca", steps=10))
