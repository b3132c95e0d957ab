"""doctor: where a model stops, the evidence for every candidate, the nearest miss, and a model left as it was."""

import json
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import moeca_fx
from moeca_fx.diagnosis import DoctorReport
from moeca_fx.errors import ConfigError
from moeca_fx.passes import PIPELINE
from moeca_fx.reasons import Reason
from moeca_fx.registry import register, unregister
from tests.discover import layers
from tests.helpers.toys import PICKS, WIDTH, Blend, Mixing, toy, toy_inputs
from tests.registry.layers import ENTRY, Odd, with_
from tests.structures import negatives

LIST = "storeys.0.layer.quarry.stones"


def _status(report: DoctorReport) -> dict[str, str]:
    return {stage.name: stage.status for stage in report.stages}


def test_a_model_that_transforms() -> None:
    model = toy()
    before = {name: (value.data_ptr(), value.clone()) for name, value in model.state_dict().items()}
    report = moeca_fx.doctor(model, toy_inputs())
    assert report.ok and report.stopped is None and report.code is None and report.error == ""
    assert set(_status(report).values()) == {"ok"}
    assert [stage.name for stage in report.stages if stage.name in dict(PIPELINE)] == [name for name, _ in PIPELINE]
    (candidate,) = report.candidates
    assert (candidate.path, candidate.experts, candidate.proven) == (LIST, 4, True)
    (attempt,) = candidate.attempts
    assert (attempt.kind, attempt.place) == ("method", "storeys.0.layer.quarry.carve")
    assert attempt.error is not None and attempt.error <= 1e-5
    text = str(report)
    assert "top-k in storeys.0.layer" in text and "rows: grains, ids: which, weights: share" in text
    assert "3 of 3, reusing" in text and text.endswith("The whole model transforms.")
    after = model.state_dict()
    assert all(after[name].data_ptr() == place for name, (place, _) in before.items())
    assert all(torch.equal(after[name], value) for name, (_, value) in before.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_block_that_is_proven_says_what_matched() -> None:
    report = moeca_fx.doctor(toy(layers.InlineRouting), toy_inputs())
    assert report.ok
    text = str(report)
    assert "method   not tried: the router runs inside the dispatching method storeys.0.layer.forward" in text
    assert "2 expert ids and weights a token; weights: aten.topk" in text


class OneOff(layers.InlineRouting):
    """One expert counts for one percent more."""

    def forward(self, z: Tensor) -> Tensor:
        rows = z.reshape(-1, WIDTH)
        share, which = self.compass(rows).softmax(-1).topk(PICKS, dim=-1)
        total = torch.zeros_like(rows)
        for number, stone in enumerate(self.stones):
            row, place = torch.where(which == number)
            factor = 1.01 if number == 2 else 1.0
            total = total.index_add(0, row, factor * stone(rows[row]) * share[row, place, None])
        return total.view(z.shape)


def test_the_nearest_miss_is_shown_with_its_tokens_and_expert() -> None:
    report = moeca_fx.doctor(toy(OneOff), toy_inputs())
    assert report.stopped == "regions" and report.code is Reason.ROUTING_UNKNOWN
    (candidate,) = report.candidates
    assert candidate.is_moe and not candidate.proven
    nearest = next(attempt.nearest for attempt in candidate.attempts if attempt.place == "storeys.0.layer.forward")
    assert nearest is not None and nearest.experts == (2,)
    assert 1e-3 < nearest.error < 2e-2 and 0 < len(nearest.tokens) < nearest.compared
    model, rows = toy(OneOff), []
    model.storeys[0].layer.compass.register_forward_hook(lambda _module, _given, scores: rows.append(scores))
    with torch.no_grad():
        model(*toy_inputs())
    taken = (rows[0].topk(PICKS, dim=-1)[1] == 2).any(-1)
    assert all(taken[token] for token in nearest.tokens)
    text = str(report)
    assert "compared tokens" in text and "those of expert 2" in text
    assert f"Reason {report.code}: {report.code.meaning}." in text and f"To do: {report.code.advice}." in text
    assert "not reached: capture, normalize" in text


@pytest.mark.parametrize(
    ("layer", "code", "shown"),
    [
        (partial(Blend, quarry=layers.HiddenBias), Reason.NOT_A_WEIGHTED_SUM, "differs from its output by"),
        (layers.CalledTwice, Reason.CALLED_AGAIN, "called 2 times in one forward"),
        (layers.OneFavourite, Reason.EXPERTS_DID_NOT_RUN, "only 1 of 4 experts ran"),
    ],
    ids=["a bias", "called twice", "one expert"],
)
def test_unproven_models(layer: type[nn.Module], code: Reason, shown: str) -> None:
    report = moeca_fx.doctor(toy(layer), toy_inputs())
    assert (report.ok, report.stopped) == (False, "regions")
    assert report.code is code and shown in report.error and shown in str(report)
    assert code in report.candidates[0].codes


def test_a_dense_model() -> None:
    report = moeca_fx.doctor(toy(layers.EveryExpert), toy_inputs())
    assert (report.stopped, report.code) == ("regions", Reason.NO_EXPERTS)
    (candidate,) = report.candidates
    assert not candidate.is_moe and Reason.EVERY_TOKEN in candidate.codes
    assert "none: no top-k ran" in str(report)
    report = moeca_fx.doctor(nn.Linear(4, 4).eval(), (torch.zeros(2, 4),))
    assert report.code is Reason.NO_EXPERTS and report.candidates == ()


class Reading(Mixing):
    """Python that depends on data, outside of the experts."""

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z / 2 if bool((z > 1e9).any()) else z)


def test_a_model_that_fails_in_capture() -> None:
    report = moeca_fx.doctor(toy(mixing=Reading), toy_inputs())
    assert (report.stopped, report.code) == ("capture", Reason.NOT_TRACEABLE)
    assert _status(report)["regions"] == "ok" and _status(report)["normalize"] == "not reached"
    assert report.candidates[0].proven


def test_a_model_whose_router_mixes_samples() -> None:
    report = moeca_fx.doctor(*negatives.with_layer(negatives.BatchMean))
    assert (report.stopped, report.code) == ("behaviour", Reason.MIXES_SAMPLES)
    assert any(candidate.attempts for candidate in report.candidates), "what was found before is shown"


@pytest.mark.parametrize(
    ("change", "stage", "code"),
    [
        (lambda model, inputs: (model.train(), inputs), "model checks", Reason.TRAINING),
        (lambda model, inputs: (model, inputs[:1]), "inputs", Reason.INPUTS),
        (lambda model, inputs: (model, (inputs[0][..., :3], inputs[1])), "probe", Reason.INPUTS),
        (lambda model, inputs: ("a model", inputs), "model checks", Reason.NOT_A_MODULE),
    ],
    ids=["training", "too few inputs", "shapes", "no module"],
)
def test_early_stops(change, stage, code) -> None:
    report = moeca_fx.doctor(*change(toy(), toy_inputs()))
    assert (report.stopped, report.code) == (stage, code)


def test_a_timestep_that_cannot_be_told() -> None:
    class Unclear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.toy = toy()

        def forward(self, grid: Tensor, one: Tensor, two: Tensor) -> Tensor:
            return self.toy(grid, one + two)

    grid, clock = toy_inputs()
    report = moeca_fx.doctor(Unclear().eval(), (grid, clock, clock))
    assert (report.stopped, report.code) == ("rest of transform", Reason.TIMESTEP)
    assert moeca_fx.doctor(Unclear().eval(), (grid, clock, clock), timestep="two").ok


def test_what_an_entry_does_is_shown() -> None:
    register(with_(prefer=True))
    try:
        report = moeca_fx.doctor(toy(Odd), toy_inputs())
    finally:
        unregister(ENTRY.name)
    assert report.ok and _status(report)["proof by entry"] == "ok"
    assert "a Odd that a registered entry matches" in str(report)


def test_json_has_everything() -> None:
    record = json.loads(json.dumps(moeca_fx.doctor(toy(layers.CalledTwice), toy_inputs()).as_dict()))
    assert (record["ok"], record["stopped"], record["code"]) == (False, "regions", "called-again")
    assert record["candidates"][0]["attempts"][-1]["code"] == "routing-unknown"


def test_a_wrong_policy_is_an_error_of_the_call() -> None:
    with pytest.raises(ConfigError):
        moeca_fx.doctor(toy(), toy_inputs(), policy="nothing like that")
