"""A command runner and a folder with tiny models of the user's own."""

import sys
import textwrap

import pytest
from typer.testing import CliRunner

from moeca_fx.cli import app

TINY_MODELS = """
    import torch
    from torch import nn
    from moeca_fx.zoo import DSMoE, DSMoEConfig, example_inputs, randomize_

    TINY = DSMoEConfig(
        input_size=8, patch_size=2, in_channels=1, hidden_size=16, depth=2, num_heads=2, mlp_ratio=2.0,
        num_experts=4, top_k=2, expert_width=8, num_classes=10, learn_sigma=False,
    )

    def tiny():
        return randomize_(DSMoE(TINY)).eval()

    def tiny_batch(batch):
        model = tiny()
        return model, example_inputs(model, batch=batch), {}

    def training():
        return tiny().train()

    def without_experts():
        return nn.Linear(4, 4).eval(), (torch.zeros(2, 4),)

    def wrong_inputs():
        return tiny(), (torch.zeros(2, 3),)

    def bare_linear():
        return nn.Linear(4, 4)

    def failing():
        raise RuntimeError("out of luck")

    def a_number():
        return 7

    constant = 3
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The working folder, holding the module ``tiny_models``."""
    (tmp_path / "tiny_models.py").write_text(textwrap.dedent(TINY_MODELS))
    (tmp_path / "broken_module.py").write_text("import a_package_nobody_has\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("tiny_models", "broken_module"):
        sys.modules.pop(name, None)


@pytest.fixture
def run(project):
    """Run the command with these arguments inside `project`; the result has exit_code, stdout and stderr."""
    runner = CliRunner()

    def invoke(*arguments):
        result = runner.invoke(app, [str(argument) for argument in arguments])
        unexpected = result.exception is not None and not isinstance(result.exception, SystemExit)
        if unexpected:
            raise result.exception
        return result

    return invoke


@pytest.fixture
def refuse(run, project):
    """Run the command, insist on exit code 2, an empty stdout and untouched files; return the message."""

    def invoke(*arguments):
        before = sorted(project.rglob("*.png")) + sorted(project.rglob("*.json"))
        result = run(*arguments)
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        assert "Traceback" not in result.stderr
        assert sorted(project.rglob("*.png")) + sorted(project.rglob("*.json")) == before
        return result.stderr

    return invoke
