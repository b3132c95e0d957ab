"""DiT-MoE against slow, obvious restatements of its facts."""

import math
from dataclasses import replace

import pytest
import torch

from moeca_fx.errors import ConfigError
from moeca_fx.zoo import DiTMoE, example_inputs, randomize_
from moeca_fx.zoo.attention import Attention, PackedAttention
from moeca_fx.zoo.dit_moe import SlicedSwiGLU, sincos_table


def test_output_is_one_tensor_with_twice_the_channels(dit_moe):
    with torch.no_grad():
        output = dit_moe(*example_inputs(dit_moe, batch=3))
    assert output.shape == (3, 8, 8, 8)
    assert output.std() > 0.1


def test_routing_weights_are_softmax_scores_not_renormalised(dit_moe):
    gate = dit_moe.blocks[0].moe.gate
    hidden = torch.randn(2, 3, 32)
    index, weight = gate(hidden)
    for row, token in enumerate(hidden.reshape(-1, 32)):
        logits = (gate.weight @ token).tolist()
        total = sum(math.exp(v) for v in logits)
        order = sorted(range(4), key=lambda e: logits[e], reverse=True)[:2]
        assert set(index[row].tolist()) == set(order)
        for e, w in zip(index[row].tolist(), weight[row].tolist(), strict=True):
            assert w == pytest.approx(math.exp(logits[e]) / total, rel=1e-4)


def test_moe_infer_is_the_weighted_sum_of_the_chosen_experts(dit_moe):
    moe = dit_moe.blocks[0].moe
    x = torch.randn(5, 32)
    index = torch.tensor([[0, 3], [3, 1], [1, 0], [3, 0], [0, 1]])  # expert 2 is never chosen
    weight = torch.rand(5, 2)
    found = moe.moe_infer(x, index.view(-1), weight.view(-1, 1))
    for row in range(5):
        expected = sum(weight[row, p] * moe.experts[int(index[row, p])](x[row]) for p in (0, 1))
        torch.testing.assert_close(found[row], expected)


def test_inference_goes_through_moe_infer_and_adds_the_shared_expert(dit_moe, monkeypatch):
    moe = dit_moe.blocks[0].moe
    hidden = torch.randn(2, 3, 32)
    monkeypatch.setattr(moe, "moe_infer", lambda x, ids, weights: torch.full_like(x, 2.0))
    with torch.no_grad():
        torch.testing.assert_close(moe(hidden), moe.shared_experts(hidden) + 2.0)


@pytest.mark.parametrize("packed", [False, True])
def test_training_path_equals_inference_path_and_is_differentiable(dit_moe_config, packed):
    config = replace(dit_moe_config, packed_attention=packed, class_dropout=0.0)
    model = randomize_(DiTMoE(config), seed=2)
    inputs = example_inputs(model)
    trained = model.train()(*inputs)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(*inputs), trained)
    trained.square().mean().backward()
    assert model.blocks[0].moe.experts[0].down_proj.weight.grad.abs().sum() > 0
    assert model.pos_embed.grad is None


def test_packed_attention_equals_the_timm_layout_when_norms_are_undone():
    torch.manual_seed(0)
    packed, plain = PackedAttention(16, 2), Attention(16, 2)
    with torch.no_grad():
        plain.qkv.load_state_dict(packed.Wqkv.state_dict())
        plain.proj.load_state_dict(packed.out_proj.state_dict())
        packed.q_norm, packed.k_norm = torch.nn.Identity(), torch.nn.Identity()
        x = torch.randn(2, 5, 16)
        torch.testing.assert_close(packed(x), plain(x))


def test_query_and_key_norms_bound_the_attention_logits():
    torch.manual_seed(0)
    attention = PackedAttention(16, 2)
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        before = attention(x)
        attention.Wqkv.weight[:32] *= 100  # queries and keys only
        attention.Wqkv.bias[:32] *= 100
        torch.testing.assert_close(attention(x), before, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("slices", [1, 2, 4])
def test_slices_do_not_change_an_expert(slices):
    torch.manual_seed(0)
    expert = SlicedSwiGLU(8, 16, slices)
    x = torch.randn(3, 8)
    gate, up, down = (p.weight for p in (expert.gate_proj, expert.up_proj, expert.down_proj))
    expected = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    torch.testing.assert_close(expert(x), expected)


def test_position_table_encodes_column_then_row():
    table = sincos_table(3, 8)[0]
    for position in range(9):
        row, column = divmod(position, 3)
        expected = []
        for place in (column, row):
            expected += [math.sin(place), math.sin(place / 100), math.cos(place), math.cos(place / 100)]
        assert table[position].tolist() == pytest.approx(expected, abs=1e-6)


def test_position_table_is_in_the_state_dict_and_frozen(dit_moe):
    assert "pos_embed" in dit_moe.state_dict()
    assert not dit_moe.pos_embed.requires_grad
    torch.testing.assert_close(dit_moe.pos_embed.detach(), sincos_table(4, 32))


def test_guidance_mixes_the_first_three_channels_and_reads_the_first_half(dit_moe):
    x, t, _ = example_inputs(dit_moe, batch=4)
    t[2:] = t[:2]
    y = torch.tensor([3, 4, 10, 10])
    with torch.no_grad():
        plain = dit_moe(torch.cat([x[:2], x[:2]]), t, y)
        guided = dit_moe.forward_with_cfg(x, t, y, 1.5)
    torch.testing.assert_close(guided[2:, :3], plain[2:, :3] + 1.5 * (plain[:2, :3] - plain[2:, :3]))
    torch.testing.assert_close(guided[:, 3:], plain[:, 3:])


@pytest.mark.parametrize(
    "change",
    [
        {"top_k": 5},
        {"hidden_size": 33},
        {"patch_size": 3},
        {"slices": 3},
        {"class_dropout": -0.1},
        {"depth": 0},
    ],
)
def test_impossible_configs_are_refused(dit_moe_config, change):
    with pytest.raises(ConfigError, match="DiTMoEConfig"):
        replace(dit_moe_config, **change)
