"""Regions are found and proven by structure, under any names and in every form of dispatch."""

from collections.abc import Callable
from functools import partial

import pytest
from torch import nn

from moeca_fx.discover import MoERegion, discover
from tests.discover import layers
from tests.helpers import toys, zoo_models
from tests.helpers.toys import Blend, toy, toy_inputs

PLACE = "storeys.0.layer.quarry"


def _only_region(layer: Callable[[], nn.Module]) -> MoERegion:
    found = discover(toy(layer), toy_inputs(), {})
    assert [refusal for refusal in found.refused if refusal.is_moe] == []
    (region,) = found.regions
    return region


def test_every_field_of_a_region_under_unusual_names() -> None:
    region = _only_region(Blend)
    assert region.error < 1e-6
    assert region == MoERegion(
        path=PLACE,
        method="carve",
        block="storeys.0.layer",
        experts=tuple(f"{PLACE}.stones.{i}" for i in range(toys.POOL)),
        top_k=toys.PICKS,
        x="grains",
        expert="which",
        weight="share",
        error=region.error,
        container=f"{PLACE}.stones",
    )
    assert region.num_experts == toys.POOL


@pytest.mark.parametrize(
    ("quarry", "method"),
    [
        (layers.Decorated, "carve"),
        (layers.HiddenByDecorator, "forward"),
        (layers.KeyedQuarry, "carve"),
        (layers.ReversedArguments, "shape"),
    ],
)
def test_forms_of_dispatch(quarry: Callable[[], nn.Module], method: str) -> None:
    region = _only_region(partial(Blend, quarry=quarry))
    assert (region.path, region.method) == (PLACE, method)
    assert (region.x, region.expert, region.weight) == ("grains", "which", "share")
    assert (region.top_k, region.num_experts) == (toys.PICKS, toys.POOL)


def test_an_expert_that_never_runs_is_still_one_of_them() -> None:
    region = _only_region(layers.NeverTheLast)
    assert region.num_experts == toys.POOL


def test_two_layers_are_two_regions_and_their_list_is_none() -> None:
    found = discover(toy(height=2), toy_inputs(), {})
    assert [region.path for region in found.regions] == [f"storeys.{i}.layer.quarry" for i in (0, 1)]
    assert [(refusal.path, refusal.is_moe) for refusal in found.refused] == [("storeys", False)]
    assert "list of blocks" in found.refused[0].reason


def test_only_moe_blocks_of_a_mixed_zoo_model_are_regions() -> None:
    found = discover(zoo_models.tiny_dsmoe(depth=4), zoo_models.inputs(), {})
    assert [(r.path, r.method, r.block, r.num_experts, r.top_k) for r in found.regions] == [
        (f"blocks.{i}.mlp.experts", "forward", f"blocks.{i}.mlp", 6, 3) for i in (1, 3)
    ]
    assert not any(refusal.is_moe for refusal in found.refused)


@pytest.mark.parametrize("packed", [False, True])
def test_dispatch_through_numpy(packed: bool) -> None:
    found = discover(zoo_models.tiny_ditmoe(packed), zoo_models.inputs(), {})
    assert [(r.path, r.method, r.num_experts, r.top_k) for r in found.regions] == [
        (f"blocks.{i}.moe", "moe_infer", 5, 2) for i in (0, 1)
    ]
    assert {(r.x, r.expert, r.weight) for r in found.regions} == {("x", "flat_expert_indices", "flat_expert_weights")}


def test_keyword_inputs() -> None:
    grid, clock = toy_inputs()
    found = discover(toy(), (), {"clock": clock, "grid": grid})
    assert [region.path for region in found.regions] == [PLACE]
