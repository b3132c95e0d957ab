"""locate: exactly the sites that are there, each with its companions, and why one cannot be refreshed by rows."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from moeca_fx.errors import UnsupportedModelError
from moeca_fx.graph.sites import AttentionSite, DenseFFNSite, MoESite, Sites, kind_of
from moeca_fx.inspection import graph_text
from moeca_fx.passes.locate import locate
from tests.helpers import zoo_models
from tests.helpers.passes import Stage, staged
from tests.helpers.toys import HEADS, TOKENS, WIDTH, Blend, Mixing, toy, toy_inputs


def _kinds(sites: Sites) -> list[tuple[str, str]]:
    return [(site.path, kind_of(site)) for site in sites.ordered]


def test_every_site_of_a_model_with_dense_and_moe_blocks(dsmoe_stage: Stage) -> None:
    sites = dsmoe_stage.sites
    expected = []
    for index in range(4):
        expected += [
            (f"blocks.{index}.attn", "attention"),
            (f"blocks.{index}.mlp", "moe" if index % 2 else "dense_ffn"),
        ]
    assert _kinds(sites) == expected
    assert sites.left == ()
    assert (len(sites.attention), len(sites.moe), len(sites.dense_ffn)) == (4, 2, 2)
    for site in sites.attention:
        assert site.refused is None and site.gate is not None and site.tokens == zoo_models.TOKENS
    for site in sites.moe:
        assert site.attention == site.path.replace("mlp", "attn")
        assert site.shared_path == f"{site.path}.shared_experts"
        assert site.region == f"{site.path}.experts.forward"
        assert (site.num_experts, site.top_k, site.tokens) == (6, 3, zoo_models.TOKENS)
        assert site.router == "sigmoid, bias-corrected top-3, renormalised, scaled by 2.5"
        assert site.feature == ""


def test_residuals_chain_from_site_to_site(dsmoe_stage: Stage) -> None:
    ordered = dsmoe_stage.sites.ordered
    for before, after in pairwise(ordered):
        assert before.residual_out == after.residual_in


def test_recorded_nodes_exist_and_are_what_they_say(dsmoe_stage: Stage) -> None:
    nodes = {node.name: node for node in dsmoe_stage.normalized.graph.nodes}
    aten = torch.ops.aten
    for site in dsmoe_stage.sites.ordered:
        assert nodes[site.residual_out].target is aten.add.Tensor
        assert nodes[site.gate or ""] in nodes[nodes[site.residual_out].args[1].name].args
        if isinstance(site, AttentionSite):
            core = nodes[site.core]
            assert core.target is aten.scaled_dot_product_attention.default
            assert [arg.name for arg in core.args[:3]] == [site.query, site.key, site.value]
            assert nodes[site.output].target is aten.linear.default
        elif isinstance(site, MoESite):
            marker = nodes[site.experts]
            assert marker.target is torch.ops.moeca.experts.default
            assert [arg.name for arg in marker.args[:3]] == [site.x, site.expert, site.weight]
        else:
            assert isinstance(site, DenseFFNSite) and nodes[site.output].target is aten.linear.default


def test_the_graph_is_left_as_it_is(toy_stage: Stage) -> None:
    before = graph_text(toy_stage.normalized)
    again = locate(toy_stage.normalized, toy_stage.captured.regions)
    assert graph_text(toy_stage.normalized) == before
    assert again == toy_stage.sites


@pytest.mark.parametrize("packed", [False, True], ids=["timm", "packed"])
def test_both_attention_layouts_of_dit_moe(packed: bool) -> None:
    sites = staged(zoo_models.tiny_ditmoe(packed), zoo_models.inputs()).sites
    assert _kinds(sites) == [
        (f"blocks.{i}.{leaf}", kind) for i in (0, 1) for leaf, kind in (("attn", "attention"), ("moe", "moe"))
    ]
    assert all(site.refused is None for site in sites.attention)
    for site in sites.moe:
        assert site.attention == site.path.replace("moe", "attn")
        assert site.shared_path == f"{site.path}.shared_experts"
        assert site.router == "softmax, top-2"
    assert sites.left == ()


def _located(
    layer: Callable[[], nn.Module] = Blend, mixing: Callable[[], nn.Module] = Mixing, height: int = 1
) -> Sites:
    return staged(toy(layer, mixing, height), toy_inputs()).sites


def test_two_instances_under_unusual_names(toy_stage: Stage) -> None:
    assert _kinds(toy_stage.sites) == [
        (f"storeys.{i}.{leaf}", kind) for i in (0, 1) for leaf, kind in (("mixing", "attention"), ("layer", "moe"))
    ]
    names = [vars(site) for site in toy_stage.sites.ordered]
    for field in ("residual_out", "output", "experts"):
        held = [fields[field] for fields in names if field in fields]
        assert len(set(held)) == len(held) > 0


def test_without_shared_expert() -> None:
    (site,) = _located(partial(Blend, constant=None)).moe
    assert (site.shared, site.shared_root, site.shared_path) == (None, None, None)


class WithIdentity(Blend):
    """Adds the tokens themselves, weighted by a router of two matrices: an expert without parameters."""

    def __init__(self) -> None:
        super().__init__(constant=None)
        self.map = nn.Linear(WIDTH, WIDTH)

    def choose(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return super().choose(self.map(rows).tanh())

    def forward(self, z: Tensor) -> Tensor:
        rows = z.reshape(-1, WIDTH)
        which, share = self.choose(rows)
        kept = (share * (which == 0)).sum(-1, keepdim=True)
        return (self.quarry(rows, which, share) + kept * rows).view(z.shape)


def test_what_the_routing_weighs_is_no_shared_expert() -> None:
    (site,) = _located(WithIdentity).moe
    assert site.shared is None


def test_grouped_query_attention() -> None:
    (site,) = _located(mixing=partial(Mixing, kv_heads=HEADS // 2)).attention
    assert site.refused is None


def test_masked_attention_is_a_site_that_cannot_be_refreshed_by_rows() -> None:
    (site,) = _located(mixing=partial(Mixing, masked=True)).attention
    assert site.refused == "attention with a mask cannot be recomputed for single rows"


class Causal(Mixing):
    """Attends to earlier tokens only."""

    def forward(self, z: Tensor) -> Tensor:
        q = self.ask(z).view(-1, TOKENS, HEADS, self.each).transpose(1, 2)
        mixed = functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        out: Tensor = self.back(mixed.transpose(1, 2).reshape(z.shape))
        return out


class Smeared(Mixing):
    """Mixes neighbouring tokens before it attends."""

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = super().forward(z + z.roll(1, dims=1))
        return out


class SmearedAfter(Mixing):
    """Mixes all tokens after it attended."""

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = super().forward(z)
        return out - out.mean(1, keepdim=True)


class TokensFirst(Mixing):
    """Attends over tensors laid out [B, T, h, d] as if h were the sequence: not attention over tokens."""

    def forward(self, z: Tensor) -> Tensor:
        q = self.ask(z).view(-1, TOKENS, HEADS, self.each)
        out: Tensor = self.back(functional.scaled_dot_product_attention(q, q, q).reshape(z.shape))
        return out


@pytest.mark.parametrize(
    ("mixing", "reason"),
    [
        (Causal, "attention with a mask"),
        (Smeared, "aten.roll.default.* is not known to act on each token alone"),
        (SmearedAfter, "works across the token or sample axis"),
        (TokensFirst, r"not laid out \[B, h, T, d\]"),
    ],
)
def test_attention_that_mixes_tokens_elsewhere(mixing: Callable[[], nn.Module], reason: str) -> None:
    (site,) = _located(mixing=mixing).attention
    assert site.refused is not None
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(site.refused)


class Plain(nn.Module):
    """A dense layer."""

    def __init__(self, mixes: bool = False) -> None:
        super().__init__()
        self.one, self.two, self.mixes = nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH), mixes

    def forward(self, z: Tensor) -> Tensor:
        hidden = functional.silu(self.one(z))
        out: Tensor = self.two(hidden - hidden.mean(1, keepdim=True) if self.mixes else hidden)
        return out


@pytest.mark.parametrize("mixes", [False, True], ids=["token-wise", "mixes tokens"])
def test_dense_layers(mixes: bool) -> None:
    kinds = iter([partial(Plain, mixes), Blend])
    sites = _located(layer=lambda: next(kinds)(), height=2)
    if mixes:
        assert sites.dense_ffn == ()
        ((path, reason),) = sites.left
        assert path == "storeys.0.layer" and "feed-forward computed in full" in reason and "mean" in reason
    else:
        assert [site.path for site in sites.dense_ffn] == ["storeys.0.layer"]
        assert sites.left == ()
    assert [site.path for site in sites.moe] == ["storeys.1.layer"]


class NoResidual(nn.Module):
    """Runs after the blocks: attention whose result replaces the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.mixing = Mixing()

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = self.mixing(z)
        return out


def test_attention_without_residual_is_left_with_a_reason() -> None:
    sites = staged(toy(finish=NoResidual), toy_inputs()).sites
    assert len(sites.attention) == 1
    assert sites.left == (
        (
            "finish.mixing",
            "attention without a residual addition over a token stream [B, T, H]; computed in full",
        ),
    )


def test_experts_without_residual_are_refused() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Blend(constant=None)
            self.scale = nn.Linear(1, 1)

        def forward(self, grid: Tensor, clock: Tensor) -> Tensor:
            out: Tensor = self.layer(grid * clock.sin()[:, None, None])
            return out

    torch.manual_seed(0)
    with pytest.raises(
        UnsupportedModelError, match=r"layer: expected a residual addition .* found none; write the block as"
    ):
        staged(Bare().eval(), toy_inputs())


class MixedFirst(Blend):
    """Its experts read tokens mixed with their neighbours."""

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = super().forward(z + z.roll(1, dims=1))
        return out


def test_experts_that_read_mixed_tokens_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"storeys\.0\.layer: the experts' input mixes tokens: .*roll"):
        _located(MixedFirst)
