"""``moeca-fx inspect``: the table, pure JSON, graphs on request, exported artefacts, and its errors."""

import json

import onnx
import pytest

from moeca_fx.export.manifest import FILE, read_manifest
from tests.discover.layers import StackedExperts
from tests.helpers.artefacts import cache, cache_ports, make_artefact, refused_artefact
from tests.helpers.toys import toy, toy_inputs

STAGES = (
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
)


_RECORDS = {}


def _record(run, *options):
    """What it says of the tiny model as JSON; once for all tests that ask the same."""
    if options not in _RECORDS:
        _RECORDS[options] = json.loads(run("inspect", "tiny_models:tiny", "--json", *options).stdout)
    return _RECORDS[options]


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


def test_a_model_without_weights(run):
    result = run("inspect", "tests.cli.test_inspect:on_meta")
    assert result.exit_code == 0
    assert "sites hold" in result.stdout and "MoE" in result.stdout
    assert "nothing was proven on data" in result.stderr and "storeys.0.layer" in result.stderr


def on_meta():
    """Two layers of stacked experts, on the meta device."""
    return toy(StackedExperts, height=2).to("meta"), tuple(value.to("meta") for value in toy_inputs())


def test_json_is_all_that_reaches_stdout(run):
    record = _record(run)
    assert sorted(site["kind"] for site in record["sites"]) == ["attention", "attention", "dense_ffn", "moe"]
    assert "graphs" not in record


def test_the_cache_grows_with_the_batch(run):
    sizes = [sum(site["cache_bytes"] for site in _record(run, "--batch", n)["sites"]) for n in (1, 3)]
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
        _record(run, *options)["cache_bytes"] for options in ((), ("--cache-dtype", "bf16"), ("--cache-dtype", "fp8"))
    ]
    assert sizes[0] > sizes[1] > sizes[2] > 0
    message = refuse("inspect", "tiny_models:tiny", "--cache-dtype", "int4")
    assert "cache_dtype: expected None" in message and "found 'int4'" in message


def _rows(text):
    """First words of the lines -> lines."""
    return {line.split()[0]: line.rstrip() for line in text.splitlines() if line.strip()}


def test_an_artefact_is_described(run, project, monkeypatch):
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX, which exists for Linux: the extra tensorrt")
    monkeypatch.setenv("COLUMNS", "100")
    refused_artefact(project / "made")
    result = run("inspect", "made")
    assert (result.exit_code, result.stderr) == (0, "")
    rows = _rows(result.stdout)
    assert rows["Artefact"] == "Artefact made: ONNX, in onnxruntime"
    assert rows["model"].split()[1:3] == ["Tiny,", "float32,"]
    assert "x [batch, 4] float32" in rows["takes"] and "result [batch, 4] float32" in rows["gives"]
    assert rows["nodes"].endswith("3: Cast{0}1, NonZero{0}1, Relu{0}1".format("\N{MULTIPLICATION SIGN}"))
    text = " ".join(result.stdout.split())
    assert "refuses the graph: picked (NonZero): unsupported node: NonZero plugin" in text
    assert rows["8"].split() == ["8", "805", "FLOPs"]
    assert max(map(len, result.stdout.splitlines())) <= 100
    left_out = " ".join(run("inspect", "made", "--no-tensorrt").stdout.split())
    assert "TensorRT not asked: left out on request" in left_out and "NonZero plugin" not in left_out


def test_caches_and_steps_of_an_artefact(run, project, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    plain = read_manifest(make_artefact(project / "made", kind="tensorrt"))
    feature, graph, step = cache("feature", 1000), plain.graphs[0], plain.steps[0]
    graph["inputs"] += cache_ports("in", feature)
    graph["outputs"] += cache_ports("out", feature)
    make_artefact(
        project / "made",
        kind="tensorrt",
        batch=[3, 3, 3],
        caches=[feature],
        graphs=[graph],
        steps=[{**step, "name": "full", "force": 1}, {**step, "name": "cached", "force": 0}],
        flops={
            "by_batch": {"uncached": [0, 10], "full": [0, 20], "probe": [0, 0], "rule 0": [0, 1000]},
            "each": [[]],
        },
        compute_capabilities=["8.9", "12.0"],
    )
    result = run("inspect", "made")
    rows = _rows(result.stdout)
    assert rows["Graph"].endswith("the full step (force 1) and the cached step (force 0)")
    assert rows["takes"].endswith("float32, 1 cache") and "cannot be listed" in rows["nodes"]
    assert rows["blocks.0"].split() == ["blocks.0", "feature", "4", "kB"]
    assert rows["3"].split() == ["3", "12", "kB", "24", "kB", "30", "FLOPs", "60", "FLOPs", "3", "kFLOPs"]
    assert "two sets of buffers" in result.stdout and "FLOPs of cached: the fixed part" in result.stdout
    assert "TensorRT  not asked" not in result.stdout and rows["GPUs"].endswith("compute capability 8.9, 12.0")


def test_an_artefact_as_json(run, project):
    refused_artefact(project / "made")
    result = run("inspect", "made", "--json", "--no-tensorrt")
    record = json.loads(result.stdout)
    assert (record["kind"], record["batch"]) == ("onnx", [1, 2, 8])
    (graph,) = record["graphs"]
    assert graph["contents"]["nodes"] == len(onnx.load(project / "made" / "model.onnx").graph.node) == 3
    assert graph["rejections"] is None and record["tensorrt"] == {"version": None, "note": "left out on request"}


def test_options_of_models_and_of_artefacts(refuse, project):
    make_artefact(project / "made")
    for options in (
        ("--weights", "w.safetensors"),
        ("--batch", "2"),
        ("--cache-dtype", "fp8"),
        ("--graph", "capture"),
    ):
        message = refuse("inspect", "made", *options)
        assert f"is a folder that moeca-fx export wrote (it holds {FILE}), and {options[0]} belongs" in message
    assert "--weights, --batch belong to models; drop them" in refuse(
        "inspect", "made", "--weights", "w", "--batch", "2"
    )
    message = refuse("inspect", "tiny_models:tiny", "--no-tensorrt")
    assert "--no-tensorrt belongs to a folder" in message and f"it holds no {FILE}" in message


def test_a_damaged_artefact_is_one_error(refuse, project):
    made = make_artefact(project / "made")
    (made / "model.onnx").write_bytes(b"other")
    message = refuse("inspect", "made")
    assert message.count("error: ") == 1 and "is not the file that manifest.json describes" in message
    (made / FILE).write_text(json.dumps({"format": 99}))
    assert "format 99 is newer than what this moeca_fx reads" in refuse("inspect", "made")


def test_a_folder_without_a_manifest_is_a_model_s_name_as_ever(refuse, project):
    (project / "nothing").mkdir()
    assert "package.module:factory" in refuse("inspect", "nothing")
