"""``moeca-fx inspect``: the table, pure JSON, graphs on request, and its errors."""

import json

import pytest

STAGES = ("capture", "normalize", "vectorize_experts", "insert_cache.full", "insert_cache.cached")


def test_the_table_lists_every_site(run):
    result = run("inspect", "tiny_models:tiny")
    assert result.exit_code == 0
    lines = [line for line in result.stdout.splitlines() if line.startswith("blocks.")]
    kinds = [line.split()[1] for line in lines]
    assert sorted(kinds) == ["MoE", "attention", "attention", "dense"]
    moe = next(line for line in lines if " MoE " in line)
    assert moe.split()[2:4] == ["4", "2"]  # experts, k
    assert "blocks.1.mlp.shared_experts" in result.stdout
    assert "4 sites" in result.stdout


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


@pytest.mark.parametrize("stage", STAGES)
def test_a_graph_is_printed_on_request(run, stage):
    result = run("inspect", "tiny_models:tiny", "--graph", stage)
    assert result.stdout.startswith(f"# {stage}\n")
    assert "placeholder" in result.stdout or "%" in result.stdout


def test_all_graphs_fit_into_the_json(run):
    record = json.loads(run("inspect", "tiny_models:tiny", "--json", "--graph", "all").stdout)
    assert list(record["graphs"]) == list(STAGES)


def test_bad_input_is_refused(refuse):
    assert "no stage is called 'lower'" in refuse("inspect", "tiny_models:tiny", "--graph", "lower")
    assert "--batch must be at least 1" in refuse("inspect", "tiny_models:tiny", "--batch", "0")
    assert "nowhere.safetensors" in refuse("inspect", "tiny_models:tiny", "--weights", "nowhere.safetensors")


def test_a_corrupt_weights_file_is_refused(refuse, project):
    (project / "bad.safetensors").write_bytes(b"not a weights file")
    assert "bad.safetensors" in refuse("inspect", "tiny_models:tiny", "--weights", "bad.safetensors")


@pytest.mark.parametrize(
    ("factory", "part"),
    [("without_experts", "expert"), ("training", "eval()"), ("wrong_inputs", "input")],
)
def test_a_model_that_cannot_be_served_is_refused(refuse, factory, part):
    assert part in refuse("inspect", f"tiny_models:{factory}")
