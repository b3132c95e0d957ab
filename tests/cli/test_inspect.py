"""``moeca-fx inspect``: the table, pure JSON, graphs on request, and its errors."""

import json

import pytest

STAGES = (
    "capture",
    "normalize",
    "locate",
    "vectorize_experts",
    "pack_stream",
    "insert_cache.full",
    "insert_cache.cached",
    "lower_kernels.full",
    "lower_kernels.cached",
    "lower_inplace.cached",
)


def test_the_table_lists_every_site(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = run("inspect", "tiny_models:tiny")
    assert result.exit_code == 0
    cells = [line.split() for line in result.stdout.splitlines() if line.startswith("blocks.")]
    assert [row[:3] for row in cells] == [
        ["blocks.0.attn", "attention", "reuse"],  # nothing before it that could be refreshed
        ["blocks.0.mlp", "dense", "FFN"],
        ["blocks.1.attn", "attention", "synchronized"],
        ["blocks.1.mlp", "MoE", "branches"],
    ]
    assert cells[3][3:5] == ["4", "2"]  # experts, k
    assert max(map(len, result.stdout.splitlines())) <= 80
    text = " ".join(result.stdout.split())
    assert "router sigmoid, bias-corrected top-2" in text and "shared expert shared_experts" in text
    assert "4 sites hold" in text
    assert result.stderr == ""


def test_json_is_all_that_reaches_stdout(run):
    result = run("inspect", "tiny_models:tiny", "--json")
    record = json.loads(result.stdout)
    assert sorted(site["kind"] for site in record["sites"]) == ["attention", "attention", "dense_ffn", "moe"]
    assert "graphs" not in record


def test_the_cache_grows_with_the_batch(run):
    sizes = [
        sum(
            site["cache_bytes"]
            for site in json.loads(run("inspect", "tiny_models:tiny", "--json", "--batch", n).stdout)["sites"]
        )
        for n in (1, 3)
    ]
    assert sizes[1] == 3 * sizes[0] > 0


def test_graphs_are_printed_on_request(run):
    result = run("inspect", "tiny_models:tiny", "--graph", "normalize", "--graph", "insert_cache.cached")
    first, _, second = result.stdout.partition("# insert_cache.cached\n")
    assert first.startswith("# normalize\nx = input\n")
    assert "moeca.experts(" in first and "cache_" not in first
    assert "cache_blocks_1_mlp_feature = input" in second and "write_rows(" in second


def test_all_graphs_fit_into_the_json(run):
    record = json.loads(run("inspect", "tiny_models:tiny", "--json", "--graph", "all").stdout)
    assert list(record["graphs"]) == list(STAGES)
    assert all(text.rstrip().splitlines()[-1].startswith("return ") for text in record["graphs"].values())


def test_bad_input_is_refused(refuse):
    assert "no stage is called 'lower'" in refuse("inspect", "tiny_models:tiny", "--graph", "lower")
    assert "--batch must be at least 1" in refuse("inspect", "tiny_models:tiny", "--batch", "0")
    assert "nowhere.safetensors" in refuse("inspect", "tiny_models:tiny", "--weights", "nowhere.safetensors")


def test_a_corrupt_weights_file_is_refused(refuse, project):
    (project / "bad.safetensors").write_bytes(b"not a weights file")
    assert "bad.safetensors" in refuse("inspect", "tiny_models:tiny", "--weights", "bad.safetensors")


@pytest.mark.parametrize(
    ("factory", "parts"),
    [
        ("training", ["in training mode", "model.eval()"]),
        ("hooked", ["blocks.0.attn", "hooks", "remove them"]),
        ("quantised", ["blocks.1.mlp.experts", "quantised", "unquantised"]),
        ("not_finite", ["example input 0", "NaN"]),
        ("wrong_inputs", ["example inputs do not fit DSMoE.forward", "missing"]),
        ("wrong_shapes", ["DSMoE cannot run on the example inputs"]),
    ],
)
def test_a_model_that_cannot_be_served_is_refused(refuse, factory, parts):
    message = refuse("inspect", f"tiny_models:{factory}")
    for part in parts:
        assert part in message


def test_a_model_without_experts_is_refused_with_what_was_looked_at(refuse, run):
    message = refuse("inspect", "tiny_models:without_experts")
    assert "no mixture-of-experts layer was found" in message and "no list of identical modules" in message
    assert "layers: no router" in refuse("inspect", "tiny_models:parallel_branches")
    result = run("inspect", "tiny_models:parallel_branches", "--json")  # a program gets its record all the same
    record = json.loads(result.stdout)
    assert (result.exit_code, record["sites"]) == (2, [])
    assert [refusal["path"] for refusal in record["refused"]] == ["layers"]


def test_an_unproven_region_is_refused_with_its_path_and_reason(refuse):
    for arguments in (["inspect"], ["sample", "--steps", "2"]):
        message = refuse(arguments[0], "tiny_models:unproven", *arguments[1:])
        assert "blocks.1.mlp.experts" in message and "differs from its output by" in message


def test_the_cache_in_fewer_bits(run, refuse):
    sizes = [
        json.loads(run("inspect", "tiny_models:tiny", "--json", *options).stdout)["cache_bytes"]
        for options in ((), ("--cache-dtype", "bf16"), ("--cache-dtype", "fp8"))
    ]
    assert sizes[0] > sizes[1] > sizes[2] > 0
    message = refuse("inspect", "tiny_models:tiny", "--cache-dtype", "int4")
    assert "cache_dtype: expected None" in message and "found 'int4'" in message
