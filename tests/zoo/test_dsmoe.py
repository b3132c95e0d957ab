"""DSMoE against slow, obvious restatements of its facts."""

import math
from dataclasses import replace

import pytest
import torch

from moeca_fx.errors import ConfigError
from moeca_fx.zoo import DSMoE, DSMoEConfig, example_inputs, randomize_
from moeca_fx.zoo.attention import Attention, rope_tables, rotate
from moeca_fx.zoo.dsmoe import MoELayer
from moeca_fx.zoo.layers import TimestepEmbedder, unpatchify


@pytest.fixture
def layer(dsmoe: DSMoE) -> MoELayer:
    return dsmoe.blocks[1].mlp


def test_output_is_the_published_tuple(dsmoe):
    x, t, y = example_inputs(dsmoe, batch=3)
    with torch.no_grad():
        output = dsmoe(x, t, y)
    assert isinstance(output, tuple) and len(output) == 6
    assert output[0].shape == (3, 8, 8, 8)
    assert output[0].std() > 0.1


def test_routing_is_sigmoid_choice_with_bias_and_unbiased_renormalised_weights(layer):
    logits = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer.gate.e_score_correction_bias.copy_(torch.tensor([0.9, 0.0, 0.0, -0.9, 0.0, 0.1]))
    index, weight = layer.route(logits)
    for row in range(5):
        score = [1 / (1 + math.exp(-v)) for v in logits[row].tolist()]
        bias = layer.gate.e_score_correction_bias.tolist()
        order = sorted(range(6), key=lambda e: score[e] + bias[e], reverse=True)[:3]
        assert set(index[row].tolist()) == set(order)
        total = sum(score[e] for e in order)
        for e, w in zip(index[row].tolist(), weight[row].tolist(), strict=True):
            assert w == pytest.approx(2.5 * score[e] / total, rel=1e-5)


def test_layer_output_is_the_weighted_sum_of_its_experts_plus_the_shared_one(layer):
    hidden = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = layer(hidden)
        index, weight = layer.route(layer.gate(hidden))
        for row, token in enumerate(hidden.reshape(-1, 32)):
            expected = layer.shared_experts(token)
            for e, w in zip(index[row].tolist(), weight[row], strict=True):
                expected = expected + w * layer.experts.blocks[e](token)
            torch.testing.assert_close(output.reshape(-1, 32)[row], expected)


def test_experts_that_nobody_chose_are_skipped(layer):
    calls = []
    for number, expert in enumerate(layer.experts.blocks):
        expert.register_forward_hook(lambda *_, number=number: calls.append(number))
    index = torch.tensor([[0, 2, 5], [2, 0, 5]])
    with torch.no_grad():
        layer.experts(torch.randn(2, 32), index, torch.ones(2, 3))
    assert calls == [0, 2, 5]


def test_full_groups_change_nothing_and_one_group_restricts(dsmoe_config):
    logits = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    plain = MoELayer(dsmoe_config).route(logits)[0].sort().values
    full = MoELayer(replace(dsmoe_config, n_group=2, topk_group=2)).route(logits)[0].sort().values
    one = MoELayer(replace(dsmoe_config, n_group=2, topk_group=1)).route(logits)[0]
    assert torch.equal(plain, full)
    assert ((one < 3).all(1) | (one >= 3).all(1)).all()
    assert not torch.equal(plain, one.sort().values)


def test_router_computes_in_fp32_for_a_half_precision_model(layer):
    hidden = torch.randn(1, 4, 32)
    layer.bfloat16()
    logits = layer.gate(hidden.bfloat16())
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, hidden.bfloat16()[0].float() @ layer.gate.weight.float().T)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.gate(hidden.bfloat16()), logits)


def test_blocks_alternate_dense_and_moe(dsmoe, dsmoe_config):
    assert [isinstance(block.mlp, MoELayer) for block in dsmoe.blocks] == [False, True, False, True]
    everywhere = DSMoE(replace(dsmoe_config, interleave=False))
    assert all(isinstance(block.mlp, MoELayer) for block in everywhere.blocks)


def test_rope_turns_each_half_by_row_and_column():
    side, dim = 3, 16
    cos, sin = rope_tables(side, dim)
    x = torch.randn(1, 1, side * side, dim, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, cos, sin)[0, 0]
    for position in range(side * side):
        for half, place in ((0, position // side), (1, position % side)):
            for i in range(4):
                angle = place * 10000 ** (-i / 4)
                a, b = 8 * half + i, 8 * half + i + 4
                z = complex(x[0, 0, position, a], x[0, 0, position, b]) * complex(math.cos(angle), math.sin(angle))
                assert turned[position, a] == pytest.approx(z.real, abs=1e-5)
                assert turned[position, b] == pytest.approx(z.imag, abs=1e-5)


def test_attention_packs_queries_keys_values_by_head():
    torch.manual_seed(0)
    attention = Attention(16, 2)
    x = torch.randn(1, 5, 16)
    with torch.no_grad():
        packed = attention.qkv(x)[0]  # [T, 48]: q head 0, q head 1, k head 0, ...
        heads = []
        for head in (0, 1):
            q, k, v = (packed[:, 16 * part + 8 * head : 16 * part + 8 * head + 8] for part in (0, 1, 2))
            heads.append((q @ k.T / math.sqrt(8)).softmax(-1) @ v)
        torch.testing.assert_close(attention(x)[0], attention.proj(torch.cat(heads, dim=1)))


@pytest.mark.parametrize("number", [0, 1])
def test_a_block_modulates_and_gates_attention_then_feed_forward(dsmoe, number):
    block = dsmoe.blocks[number]
    x, condition = torch.randn(1, 16, 32), torch.randn(1, 32)

    def norm(h):
        return (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()

    with torch.no_grad():
        six = block.adaLN_modulation[1](torch.nn.functional.silu(condition))[0].reshape(6, 32)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = six
        expected = x + gate_a * block.attn(norm(x) * (1 + scale_a) + shift_a)
        expected = expected + gate_m * block.mlp(norm(expected) * (1 + scale_m) + shift_m)
        torch.testing.assert_close(block(x, condition), expected, atol=1e-5, rtol=1e-4)


def test_timestep_embedding_is_cosines_then_sines():
    embedder = TimestepEmbedder(8)
    seen = []
    embedder.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    embedder(torch.tensor([0.25, 7.0]))
    for row, t in enumerate((0.25, 7.0)):
        for i in (0, 1, 64, 127):
            angle = t * 10000 ** (-i / 128)
            assert seen[0][row, i] == pytest.approx(math.cos(angle), abs=1e-5)
            assert seen[0][row, 128 + i] == pytest.approx(math.sin(angle), abs=1e-5)


def test_patch_values_are_ordered_row_column_patch_row_patch_column_channel():
    image = torch.arange(2 * 4 * 4.0).reshape(1, 2, 4, 4)
    tokens = torch.stack(
        [
            torch.stack([image[0, c, 2 * r + pr, 2 * q + pc] for pr in (0, 1) for pc in (0, 1) for c in (0, 1)])
            for r in (0, 1)
            for q in (0, 1)
        ]
    )
    assert torch.equal(unpatchify(tokens[None], 2, 2), image)


def test_guidance_mixes_the_first_three_channels_and_reads_the_first_half(dsmoe):
    x, t, _ = example_inputs(dsmoe, batch=4)
    t[2:] = t[:2]
    y = torch.tensor([3, 4, 10, 10])
    with torch.no_grad():
        plain = dsmoe(torch.cat([x[:2], x[:2]]), t, y)[0]
        guided = dsmoe.forward_with_cfg(x, t, y, 2.5)
    torch.testing.assert_close(guided[:2, :3], plain[2:, :3] + 2.5 * (plain[:2, :3] - plain[2:, :3]))
    assert torch.equal(guided[:2, :3], guided[2:, :3])
    torch.testing.assert_close(guided[:, 3:], plain[:, 3:])


def test_guidance_goes_through_forward(dsmoe, monkeypatch):
    marker = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 8, 8, 8)
    monkeypatch.setattr(dsmoe, "forward", lambda x, t, y: (marker, "Nothing"))
    guided = dsmoe.forward_with_cfg(torch.zeros(2, 4, 8, 8), torch.zeros(2), torch.zeros(2), 3.0)
    assert torch.equal(guided[:, 0, 0, 0], torch.tensor([-2.0, -2.0]))
    assert torch.equal(guided[:, 3, 0, 0], torch.tensor([0.0, 1.0]))


def test_labels_are_dropped_in_training_only(dsmoe):
    labels = torch.zeros(400, dtype=torch.int64)
    null = dsmoe.y_embedder.embedding_table.weight[10]
    torch.manual_seed(0)
    dropped = (dsmoe.y_embedder.train()(labels) == null).all(1).float().mean()
    kept = (dsmoe.y_embedder.eval()(labels) == null).all(1).any()
    assert 0.05 < dropped < 0.15
    assert not kept


def test_a_sample_does_not_depend_on_its_batch(dsmoe):
    x, t, y = example_inputs(dsmoe, batch=3)
    with torch.no_grad():
        batched = dsmoe(x, t, y)[0]
        alone = dsmoe(x[1:2], t[1:2], y[1:2])[0]
    torch.testing.assert_close(batched[1:2], alone)


def test_random_weights_let_experts_and_attention_reach_the_output(dsmoe_config):
    model = randomize_(DSMoE(dsmoe_config), seed=0).eval()
    with torch.no_grad():
        x, t, y = example_inputs(model, batch=4)
        before = model(x, t, y)[0]
        for name in ("blocks.3.mlp.shared_experts.down_proj.weight", "blocks.0.attn.proj.weight"):
            changed = randomize_(DSMoE(dsmoe_config), seed=0).eval()
            changed.get_parameter(name).zero_()
            assert not torch.allclose(changed(x, t, y)[0], before, atol=1e-3)


@pytest.mark.parametrize(
    "change",
    [
        {"top_k": 7},
        {"top_k": 0},
        {"hidden_size": 30},
        {"patch_size": 3},
        {"n_group": 4},
        {"n_group": 2, "topk_group": 3},
        {"n_group": 6},
        {"n_group": 3, "topk_group": 1},
        {"class_dropout": 1.0},
        {"routed_scale": 0.0},
        {"depth": -1},
    ],
)
def test_impossible_configs_are_refused(dsmoe_config, change):
    with pytest.raises(ConfigError, match="DSMoEConfig"):
        replace(dsmoe_config, **change)


def test_defaults_are_the_s_e48_row():
    assert DSMoEConfig().tokens == 256
    assert DSMoEConfig().out_channels == 8
