"""The generator: its sample holds what it promises, and its models do what their structure says."""

import random
from dataclasses import asdict, replace
from itertools import combinations, product

import pytest
import torch

from tests.structures.layer import layer_class, layer_source
from tests.structures.model import WIDTH, build, call, inputs
from tests.structures.sampling import FAST_SIZE, covered, fast_sample, sample, valid_pairs
from tests.structures.structure import AXES, RULES, Structure, complete, is_valid, why_invalid

EVERY_TENTH = range(0, 420, 10)


def test_the_sample_holds_every_valid_pair() -> None:
    structures = sample()
    assert len(structures) == len(set(structures)) >= 400
    assert all(is_valid(structure) for structure in structures)
    assert covered(structures) == valid_pairs()


def test_pairs_left_out_break_a_rule() -> None:
    every = {
        pair for a, b in combinations(AXES, 2) for pair in product(((a, v) for v in AXES[a]), ((b, v) for v in AXES[b]))
    }
    missing = every - valid_pairs()
    assert valid_pairs() <= every and len(missing) < 0.1 * len(every)
    for pair in missing:
        assert complete(dict(pair), random.Random(1)) is None


def test_the_fast_sample_holds_every_value() -> None:
    chosen = [sample()[index] for index in fast_sample()]
    assert len(chosen) == FAST_SIZE
    for axis, values in AXES.items():
        assert {getattr(structure, axis) for structure in chosen} == set(values)


def test_every_rule_leaves_something_out() -> None:
    for rule in RULES:
        assert rule.why
        assert any(not rule.holds(*values) for values in product(*(AXES[axis] for axis in rule.axes)))
    assert why_invalid(Structure()) is None
    assert why_invalid(Structure(top_k=5)) == "a token has at most E experts"


def test_fields_are_the_axes() -> None:
    assert list(asdict(Structure())) == list(AXES)
    assert all(getattr(Structure(), axis) in values for axis, values in AXES.items())


@pytest.mark.parametrize(
    "base",
    [
        Structure(top_k=3, num_experts=6, weights="renormalised_scaled", scores="both"),
        Structure(routing="capacity", top_k=3, special="identity", expert="gelu_bias"),
        Structure(routing="capacity", top_k=2, special="zero", container="attributes"),
        Structure(special="identity", container="stacked_out_in", expert="fused", top_k=4),
        Structure(routing="capacity", special="identity", container="stacked_in_out", selection="bias"),
        Structure(routing="threshold", scores="sigmoid", top_k=1, num_experts=6),
        Structure(routing="expert_choice", top_k=3, weights="renormalised", container="dict"),
        Structure(routing="expert_choice", top_k=2, container="stacked_in_out", expert="geglu"),
        Structure(container="stacked_out_in", expert="gelu_bias", selection="groups", num_experts=8),
    ],
    ids=str,
)
def test_every_dispatch_computes_the_same(base: Structure) -> None:
    x = torch.randn(2, 9, WIDTH)
    results = []
    for dispatch, rows, split in product(AXES["dispatch"], AXES["rows"], AXES["split"]):
        structure = replace(base, dispatch=dispatch, rows=rows, split=split)
        if is_valid(structure):
            torch.manual_seed(3)  # the same parameters in the same order
            results.append((structure, layer_class(structure)(WIDTH).eval()(x)))
    assert len({structure.dispatch for structure, _ in results}) >= 4
    for structure, result in results:
        torch.testing.assert_close(result, results[0][1], rtol=1e-5, atol=1e-5, msg=str(structure))


def test_capacity_drops_branches_of_each_sample() -> None:
    limited = Structure(routing="capacity", dispatch="dense", shared="none")
    free = replace(limited, routing="token_choice")
    x = torch.randn(2, 9, WIDTH)
    found = []
    for structure in (limited, free):
        torch.manual_seed(3)
        layer = layer_class(structure)(WIDTH).eval()
        found.append((layer(x), layer(x[1:])))
    assert (found[0][0] != found[1][0]).any(dim=-1).sum() >= 2, "tokens with a dropped branch"
    torch.testing.assert_close(found[0][0][1:], found[0][1])


@pytest.mark.parametrize("index", EVERY_TENTH)
def test_samples_are_independent_and_experts_matter(index: int) -> None:
    structure = sample()[index]
    model, args, kwargs = build(structure, index, batch=3)
    together = call(model, (args, kwargs))
    assert torch.isfinite(together).all()
    alone = call(model, (tuple(v[1:2] for v in args), {name: v[1:2] for name, v in kwargs.items()}))
    torch.testing.assert_close(alone, together[1:2], rtol=1e-5, atol=1e-5)
    assert not torch.equal(together, call(model, inputs(structure, 3, index, t=0.9)))
    routed = [
        parameter
        for name, parameter in model.blocks[-1].ffn.named_parameters()
        if parameter.dim() == 3 or "expert" in name
    ]
    assert routed
    for parameter in routed:
        parameter.data *= 1.05
    changed = (call(model, (args, kwargs)) - together).abs().max() / together.abs().max()
    assert changed > 1e-4, "a mistake in an expert would not show"


def test_source_is_plain_python() -> None:
    for structure in sample():
        compile(layer_source(structure), "layer", "exec")
    assert "nn.ModuleDict" in layer_source(Structure(container="dict"))
    assert "def run_experts(self, h, ids, weights):" in layer_source(Structure())
    assert "class Experts(nn.Module):" in layer_source(Structure(split="module"))
    assert "torch.where(ids == e)" in layer_source(Structure(split="inline"))
