"""``moeca-fx export`` and ``moeca-fx run``: the same picture as ``sample``, and their errors."""

import json

import pytest
import torch
from PIL import Image
from torchmetrics.functional.image import peak_signal_noise_ratio

STEPS = ("--steps", "6", "--classes", "0-4")


def _pixels(path):
    with Image.open(path) as picture:
        return torch.frombuffer(bytearray(picture.convert("L").tobytes()), dtype=torch.uint8).float()


@pytest.mark.artefact
def test_what_is_exported_is_sampled_from(run, refuse, project, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    result = run("export", "tiny_models:tiny", "--batch", "1,2,5", "-o", "made")
    assert result.exit_code == 0, result.output
    assert "running it against PyTorch" in result.stderr and "batches of 1 to 5" in result.stdout
    manifest = json.loads((project / "made" / "manifest.json").read_text())
    assert manifest["sampler"] == {"num_classes": 10, "null_class": None, "backwards": False}

    result = run("run", "made", *STEPS, "--png", "run.png")
    assert result.exit_code == 0, result.output
    assert "5 samples, 6 steps" in result.stdout
    counted = result.stdout.partition("5 samples")[0]
    result = run("sample", "tiny_models:tiny", *STEPS, "--out", "sample.png")
    assert counted and result.stdout.startswith(counted)  # the same statistics
    found, expected = _pixels(project / "run.png"), _pixels(project / "sample.png")
    assert peak_signal_noise_ratio(found, expected, data_range=255.0) >= 50

    assert "exported for batches of 1 to 5, found [10]" in refuse("run", "made", "--classes", "0-9")
    assert "no unconditional class" in refuse("run", "made", *STEPS, "--guidance", "2")
    assert "onnxruntime has no CUDAExecutionProvider" in refuse(
        "run", "made", *STEPS, "--provider", "CUDAExecutionProvider"
    )
    manifest["sampler"] = None
    (project / "made" / "manifest.json").write_text(json.dumps(manifest))
    assert "its manifest says nothing of a sampler" in refuse("run", "made", *STEPS)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--batch", "few"), "--batch: expected least,best,most"),
        (("--batch", "4,2,8"), "batch: expected one size or least, best and most"),
        (("--policy", "fora", "--graphs", "one"), "this policy has no form as one graph"),
        (("--policy", "nothing"), "policy"),
        (("--format", "aoti", "--graphs", "steps"), "--graphs and --experts: AOTInductor compiles"),
        (("--format", "aoti", "--experts", "dense"), "--graphs and --experts: AOTInductor compiles"),
        (("--format", "tensorrt", "--lengths", "nonzero"), "lengths: TensorRT takes range or input"),
        (("--format", "pt2", "--lengths", "input"), "--lengths belongs to --format onnx and tensorrt"),
        (("--lengths", "input", "--experts", "unrolled"), "lengths: 'input' gives one length for the groups"),
        (("--format", "pt2", "--experts", "unrolled"), "experts: 'unrolled' is a form of ONNX alone"),
        (("--format", "tensorrt", "--experts", "unrolled"), "experts: 'unrolled' is a form of ONNX alone"),
        (("--dtype", "bf16"), "onnxruntime has no bf16 on a CPU"),
        (("--opset", "9"), "opset: expected 18 to 22, found 9"),
        (("--workspace", "2GB"), "belong to --format tensorrt"),
        (("--format", "tensorrt", "--workspace", "much"), "--workspace: expected a size"),
        (("--format", "tensorrt", "--compute-capability", "ada"), "expected numbers such as 89"),
        (("--format", "tensorrt", "--backend", "cuda"), "backend: expected one of"),
    ],
)
def test_options_that_do_not_fit(refuse, options, words, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    assert words in refuse("export", "tiny_models:tiny", *options, "-o", "made")


def test_a_folder_without_an_artefact(refuse, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    assert "manifest.json: cannot be read" in refuse("run", "nothing")


@pytest.mark.slow
def test_an_engine(run, refuse, project, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    options = ("--format", "tensorrt", "--backend", "tensorrt-rtx", "--compute-capability", "89", "--batch", "1,2,5")
    result = run("export", "tiny_models:tiny", *options, "-o", "made")
    assert result.exit_code == 0, result.output
    assert "building model with tensorrt-rtx" in result.stderr and "100 %" in result.stderr
    assert (project / "made" / "model.engine").stat().st_size > 10_000
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "running an engine needs an NVIDIA GPU" in refuse("run", "made", *STEPS)
