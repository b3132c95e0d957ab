"""``moeca-fx sample``: the picture, the policies, and its errors."""

import pytest
import torch
from PIL import Image
from torch import nn

from moeca_fx import zoo
from moeca_fx.cli.classes import parse_classes
from moeca_fx.cli.flow import flow_of
from moeca_fx.cli.target import load_target
from moeca_fx.errors import InputError, TargetError
from tests.helpers.grids import slow

STEPS = ("--steps", "6")


def test_the_picture_has_one_tile_a_class(run, project):
    result = run("sample", "tiny_models:tiny", *STEPS, "--out", "made/it.png")
    assert result.exit_code == 0, result.output
    with Image.open(project / "made" / "it.png") as picture:
        picture.verify()
        assert picture.size == (10 * 96 + 9 * 4, 96)
    assert "10 samples, 6 steps" in result.stdout


def test_classes_fill_rows_of_ten(run, project):
    run(
        "sample",
        "tiny_models:tiny",
        *STEPS,
        "--policy",
        "original",
        "--classes",
        "0-9,3,3",
        "--out",
        "two.png",
    )
    with Image.open(project / "two.png") as picture:
        assert picture.size == (10 * 96 + 9 * 4, 2 * 96 + 4)


@pytest.mark.parametrize("policy", ["toca", slow("teacache")])
def test_a_method_that_must_know_the_steps_is_told(run, policy):
    result = run("sample", "tiny_models:tiny", *STEPS, "--policy", policy, "--out", "it.png")
    assert result.exit_code == 0, result.output


def test_policies_agree_where_they_must(run, project):
    for policy in (("original",), ("none",), ("moeca", "--interval", "1")):
        result = run("sample", "tiny_models:tiny", *STEPS, "--policy", *policy, "--out", f"{policy[0]}.png")
        assert result.exit_code == 0, result.output
    original, *others = [_pixels(project / f"{name}.png") for name in ("original", "none", "moeca")]
    for other in others:
        assert (original - other).abs().max() <= 1  # rounding to 8 bits may differ by one


def test_memory_options(run, refuse, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    small = ("sample", "tiny_models:tiny", *STEPS, "--out", "it.png")
    result = run(*small, "--cache-dtype", "fp8", "--chunk", "4", "--cache-limit", "20kB")
    assert result.exit_code == 0, result.output
    assert "beyond the cache limit: " in result.stdout and "samples of these calls computed in full" in result.stdout
    assert "cache_dtype: expected None" in refuse(*small, "--cache-dtype", "int4")
    assert "chunk: expected an integer >= 1, found 0" in refuse(*small, "--chunk", "0")
    assert "cache_limit: expected bytes" in refuse(*small, "--cache-limit", "much")
    assert "one sample" in refuse(*small, "--cache-limit", "10B")
    assert "--chunk belongs to a transformed model" in refuse(*small, "--policy", "original", "--chunk", "2")


def test_the_cache_shows_in_statistics_and_picture(run, project):
    run("sample", "tiny_models:tiny", *STEPS, "--policy", "original", "--out", "original.png")
    result = run("sample", "tiny_models:tiny", *STEPS, "--interval", "6", "--out", "cached.png")
    assert "cached" in result.stdout and "reuse" in result.stdout
    assert not torch.equal(_pixels(project / "original.png"), _pixels(project / "cached.png"))


@pytest.mark.slow
def test_guidance_moves_away_from_the_null_class(run, project):
    for scale in ("1", "0", "3"):
        result = run(
            "sample", "tiny_models:guidable", *STEPS, "--policy", "none", "--guidance", scale, "--out", f"{scale}.png"
        )
        assert result.exit_code == 0, result.output
    plain, unguided, strong = [_pixels(project / f"{name}.png") for name in ("1", "0", "3")]
    assert not torch.equal(plain, unguided) and not torch.equal(plain, strong)
    refused = run("sample", "tiny_models:tiny", *STEPS, "--guidance", "3")
    assert refused.exit_code == 2 and "no unconditional class" in refused.stderr


def test_the_seed_decides(run, project):
    pictures = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(
            "sample",
            "tiny_models:tiny",
            *STEPS,
            "--policy",
            "original",
            "--seed",
            seed,
            "--out",
            f"{name}.png",
        )
        pictures.append(_pixels(project / f"{name}.png"))
    assert torch.equal(pictures[0], pictures[1])
    assert not torch.equal(pictures[0], pictures[2])


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--interval", "0"], "interval"),
        (["--interval", "2", "--policy", "none"], "--interval belongs to --policy moeca"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--classes", "0-10"], "classes 0 to 9"),
        (["--classes", "cat"], "found 'cat'"),
        (["--classes", "5-2"], "runs backwards"),
        (["--out", "picture.jpg"], ".png"),
        (["--weights", "nowhere.pt"], "nowhere.pt"),
        (["--policy", "magic"], "magic"),
        (["--policy", "calibrated"], "expected the field full, weights; give it a value, in a YAML file"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(refuse, arguments, part):
    assert part in refuse("sample", "tiny_models:tiny", *STEPS, *arguments)


def test_an_unwritable_place_is_refused(refuse, project):
    (project / "a_file").write_text("in the way")
    assert "a_file" in refuse("sample", "tiny_models:tiny", *STEPS, "--out", "a_file/picture.png")


@pytest.mark.parametrize("policy", ["original", "moeca"])
def test_weights_that_are_not_finite_give_no_picture(refuse, project, policy):
    state = load_target("tiny_models:tiny").model.state_dict()
    torch.save({name: tensor * torch.nan for name, tensor in state.items()}, "nan.pt")
    message = refuse("sample", "tiny_models:tiny", *STEPS, "--weights", "nan.pt", "--policy", policy)
    assert "NaN" in message


def test_a_corrupt_weights_file_gives_no_picture(refuse, project):
    (project / "cut.pt").write_bytes(b"PK\x03\x04 and no more")
    assert "cut.pt is no readable torch weights file" in refuse("sample", "tiny_models:tiny", "--weights", "cut.pt")


def test_a_model_without_a_known_sampler_is_refused(refuse):
    assert "rectified-flow" in refuse("sample", "tiny_models:without_experts")


def test_class_lists():
    assert parse_classes("0-2, 7,7", 10) == [0, 1, 2, 7, 7]
    for bad in ("", "1,", "-1", "1-2-3", "1.5", "²"):
        with pytest.raises(InputError, match="expected numbers and ranges"):
            parse_classes(bad, 10)


def test_time_runs_backwards_for_dit_moe_rectified_flow():
    class Recorder(nn.Module):
        def forward(self, x, t, y):
            return torch.cat([x * t.view(-1, 1, 1, 1), x], dim=1)

    model = _dit_moe(packed_attention=True)
    x, t, y = torch.ones(2, 4, 8, 8), torch.tensor([0.25, 0.25]), torch.zeros(2, dtype=torch.int64)
    velocity = flow_of("mine", model).velocity(Recorder())(x, t, y)
    assert torch.equal(velocity, torch.full_like(x, -0.75))


def test_ddpm_models_are_refused():
    model = _dit_moe(packed_attention=False)
    with pytest.raises(TargetError, match="rectified-flow"):
        flow_of("dit-moe-s", model)


def _dit_moe(packed_attention):
    sizes = {
        "input_size": 8,
        "hidden_size": 16,
        "depth": 1,
        "num_heads": 2,
        "num_experts": 2,
        "num_classes": 4,
    }
    return zoo.DiTMoE(zoo.DiTMoEConfig(**sizes, packed_attention=packed_attention))


def _pixels(path):
    with Image.open(path) as picture:
        return torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8).int()
