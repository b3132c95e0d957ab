"""``moeca-fx doctor``: exit codes 0, 1 and 2, the text, JSON, entries from files."""

import json


def test_a_model_that_transforms_exits_with_0(run):
    result = run("doctor", "tiny_models:tiny")
    assert result.exit_code == 0
    assert "blocks.1.mlp.experts" in result.stdout and "The whole model transforms." in result.stdout
    assert "diagnosing tiny_models:tiny" in result.stderr


def test_a_model_that_stops_exits_with_1_and_says_why(run):
    result = run("doctor", "tiny_models:unproven")
    assert result.exit_code == 1
    assert "stopped  regions" in result.stdout and "Reason not-a-weighted-sum" in result.stdout
    assert "To do: " in result.stdout


def test_every_stage_that_can_stop(run):
    for target, stage in (("training", "model checks"), ("wrong_inputs", "inputs"), ("without_experts", "regions")):
        result = run("doctor", f"tiny_models:{target}", "--json")
        assert result.exit_code == 1
        assert json.loads(result.stdout)["stopped"] == stage


def test_a_wrong_target_exits_with_2(refuse):
    assert "no attribute 'huge'" in refuse("doctor", "tiny_models:huge")
    assert "--batch must be at least 1" in refuse("doctor", "tiny_models:tiny", "--batch", 0)


def test_an_entry_file_that_is_none_exits_with_2(refuse, project):
    (project / "entry.py").write_text("ENTRY = 3\n")
    assert "found int" in refuse("doctor", "tiny_models:tiny", "--entry", "entry.py")


def test_the_help_states_the_exit_codes(run):
    text = " ".join(run("doctor", "--help").stdout.split())
    assert "0 the whole model transforms, 1 it stops" in text
