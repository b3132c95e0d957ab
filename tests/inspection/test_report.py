"""inspect: every field of the report, shares that add up, reasons for what is left alone, JSON."""

import json
from functools import partial

import pytest
import torch
from torch import nn

import moeca_fx
from moeca_fx import MoECa
from moeca_fx.errors import InputError, UnsupportedModelError
from moeca_fx.inspection import InspectionReport, graph_text
from moeca_fx.runtime.flops import flop_counter
from tests.discover import layers
from tests.helpers import zoo_models
from tests.helpers.graphs import Compute, exported, stream
from tests.helpers.toys import Blend, Mixing, toy, toy_inputs
from tests.runtime.test_bad_input import Dense

BATCH = 3


@pytest.fixture(scope="module")
def report() -> InspectionReport:
    return moeca_fx.inspect(zoo_models.tiny_dsmoe(depth=4), zoo_models.inputs(BATCH))


def test_sites(report: InspectionReport) -> None:
    assert (report.model, report.batch) == ("DSMoE", BATCH)
    assert [(site.path, site.kind, site.action) for site in report.sites] == [
        ("blocks.0.attn", "attention", "reuse"),
        ("blocks.0.mlp", "dense_ffn", "reuse"),
        ("blocks.1.attn", "attention", "synchronized"),
        ("blocks.1.mlp", "moe", "rows"),
        ("blocks.2.attn", "attention", "rows"),
        ("blocks.2.mlp", "dense_ffn", "rows"),
        ("blocks.3.attn", "attention", "synchronized"),
        ("blocks.3.mlp", "moe", "rows"),
    ]
    for site in report.sites:
        if site.kind == "moe":
            assert (site.experts, site.top_k) == (6, 3)
            assert site.router == "sigmoid, bias-corrected top-3, renormalised, scaled by 2.5"
            assert site.shared_expert == f"{site.path}.shared_experts"
        else:
            assert (site.experts, site.top_k, site.router, site.shared_expert) == (None, None, None, None)


def test_flops(report: InspectionReport) -> None:
    for site in report.sites:
        assert site.flops > 0 and site.flops_share == site.flops / report.flops
    total = sum(site.flops_share for site in report.sites)
    assert 0.5 < total <= 1.0  # the rest: embeddings, modulation and the final layer
    fast = moeca_fx.transform(zoo_models.tiny_dsmoe(depth=4), zoo_models.inputs(BATCH), policy=None)
    with flop_counter() as counter, torch.no_grad():
        fast(*zoo_models.inputs(BATCH))
    assert report.flops == counter.get_total_flops()


def test_equal_sites_cost_the_same(report: InspectionReport) -> None:
    by_kind: dict[str, set[int]] = {}
    for site in report.sites:
        by_kind.setdefault(site.kind, set()).add(site.flops)
    assert all(len(flops) == 1 for flops in by_kind.values())


def test_cache_bytes_are_the_estimate(report: InspectionReport) -> None:
    estimate = moeca_fx.estimate_memory(zoo_models.tiny_dsmoe(depth=4), zoo_models.inputs(BATCH))
    assert {site.path: site.cache_bytes for site in report.sites} == dict(estimate.sites)
    assert report.cache_bytes == estimate.total


def test_estimate_for_another_batch() -> None:
    model, inputs = toy(), toy_inputs(BATCH)
    own = moeca_fx.estimate_memory(model, inputs)
    other = moeca_fx.estimate_memory(model, inputs, batch=4 * BATCH)
    assert (own.batch, other.batch) == (BATCH, 4 * BATCH) and other.total == 4 * own.total > 0
    assert dict(other.states) == {name: 4 * size for name, size in own.states}
    assert moeca_fx.estimate_memory(model, toy_inputs(1), batch=BATCH) == own


def test_a_batch_of_one_reports_its_own_cost() -> None:
    one, three = (moeca_fx.inspect(toy(), toy_inputs(batch)) for batch in (1, 3))
    assert (one.batch, 3 * one.flops, 3 * one.cache_bytes) == (1, three.flops, three.cache_bytes)


def test_json_and_text(report: InspectionReport) -> None:
    content = json.loads(json.dumps(report.as_dict()))
    assert content["model"] == "DSMoE" and len(content["sites"]) == 8 and "graphs" not in content
    assert content["cache_bytes"] == report.cache_bytes
    assert content["policy"] == MoECa().as_dict()
    assert content["refused"] == [{"path": path, "reason": reason} for path, reason in report.refused]
    text = str(report)
    assert all(site.path in text for site in report.sites) and "E6 top-3" in text
    assert all(reason in text for _, reason in report.refused)


def test_graphs_of_every_stage(report: InspectionReport) -> None:
    assert list(report.graphs) == [
        "capture",
        "normalize",
        "locate",
        "vectorize_experts",
        "pack_stream",
        "insert_cache.full",
        "insert_cache.cached",
        "pair_rotary.full",
        "pair_rotary.cached",
        "lower_kernels.full",
        "lower_kernels.cached",
        "lower_inplace.cached",
    ]
    markers = {stage: text.count("moeca.experts(") for stage, text in report.graphs.items()}
    assert markers == {stage: 2 if index < 3 else 0 for index, stage in enumerate(markers)}
    assert "cache_blocks_1_mlp_feature = input" in report.graphs["insert_cache.cached"]
    assert "write_rows_(" in report.graphs["lower_inplace.cached"]


def test_only_the_list_of_blocks_is_left_alone(report: InspectionReport) -> None:
    assert report.refused == () and report.warnings == ()  # dense and MoE blocks differ: their list is no candidate
    alike = moeca_fx.inspect(toy(height=2), toy_inputs())
    assert alike.refused == (("storeys", "a list of blocks: it contains another candidate"),)
    assert "left alone: storeys: a list of blocks" in str(alike)


def test_other_policies_show_their_actions() -> None:
    policy = MoECa(attention="reuse", shared_expert="full")
    report = moeca_fx.inspect(toy(), toy_inputs(), policy=policy)
    assert [site.action for site in report.sites] == ["reuse", "rows"]
    assert report.policy == policy.as_dict()


def test_masked_attention_is_computed_in_full() -> None:
    report = moeca_fx.inspect(toy(mixing=partial(Mixing, masked=True)), toy_inputs())
    assert [(site.kind, site.action) for site in report.sites] == [("attention", "full"), ("moe", "rows")]


def test_a_dense_model() -> None:
    report = moeca_fx.inspect(Dense().eval(), toy_inputs())
    assert (report.sites, report.refused, report.flops, report.graphs) == ((), (), 0, {})
    assert report.warnings == ("no mixture-of-experts layer was found; transform refuses",)
    assert "no mixture-of-experts layer was found" in str(report)
    json.dumps(report.as_dict())


def test_an_unproven_layer() -> None:
    report = moeca_fx.inspect(toy(partial(Blend, quarry=layers.HiddenBias)), toy_inputs())
    assert report.sites == ()
    ((path, reason),) = report.refused
    assert path == "storeys.0.layer.quarry.stones" and "differs from its output" in reason
    assert report.warnings == (f"{path} runs under a router but is not proven; transform refuses",)


class _Apart(nn.Module):
    """No attention: a layer of experts alone."""

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return z * 0.5


def test_experts_without_attention_before_them() -> None:
    report = moeca_fx.inspect(toy(mixing=_Apart), toy_inputs())
    assert [site.kind for site in report.sites] == ["moe"]
    assert report.warnings == ("storeys.0.layer: no attention directly before it; its attention is not synchronized",)


def test_inspection_leaves_the_model_as_it_is() -> None:
    model = toy()
    places = [p.data_ptr() for p in model.parameters()]
    with torch.no_grad():
        expected = model(*toy_inputs())
        moeca_fx.inspect(model, toy_inputs())
        moeca_fx.estimate_memory(model, toy_inputs())
        assert torch.equal(model(*toy_inputs()), expected)
    assert [p.data_ptr() for p in model.parameters()] == places


def test_bad_input() -> None:
    with pytest.raises(UnsupportedModelError, match="training mode"):
        moeca_fx.inspect(toy().train(), toy_inputs())
    with pytest.raises(InputError, match="do not fit"):
        moeca_fx.inspect(toy(), toy_inputs()[:1])


def test_graph_text_is_one_line_a_node() -> None:
    lines = graph_text(exported(Compute(lambda x: x * 2 + 1), stream())).splitlines()
    assert len(lines) == 4
    assert lines[0] == "inputs_0 = input" and "aten.mul(inputs_0, 2)" in lines[1]
    assert ", 1)" in lines[2] and lines[3].startswith("return (add")
