"""A command runner and a folder with tiny models of the user's own."""

import sys
import textwrap

import pytest
from typer.testing import CliRunner

from moeca_fx.cli import app

TINY_MODELS = """
    from dataclasses import replace

    import torch
    from torch import nn
    from moeca_fx.zoo import DSMoE, DSMoEConfig, example_inputs, randomize_

    TINY = DSMoEConfig(
        input_size=8, patch_size=2, in_channels=1, hidden_size=16, depth=2, num_heads=2, mlp_ratio=2.0,
        num_experts=4, top_k=2, expert_width=8, num_classes=10, learn_sigma=False, class_dropout=0.0,
    )

    def tiny():
        return randomize_(DSMoE(TINY)).eval()

    def guidable():
        return randomize_(DSMoE(replace(TINY, class_dropout=0.1))).eval()

    def tiny_batch(batch):
        model = tiny()
        return model, example_inputs(model, batch=batch), {}

    def training():
        return tiny().train()

    def without_experts():
        return nn.Linear(4, 4).eval(), (torch.zeros(2, 4),)

    def wrong_inputs():
        return tiny(), (torch.zeros(2, 3),)

    def wrong_shapes():
        x, t, y = example_inputs(tiny())
        return tiny(), (x[:, :, :3], t, y)

    def not_finite():
        x, t, y = example_inputs(tiny())
        return tiny(), (x / 0, t, y)

    def hooked():
        model = tiny()
        model.blocks[0].attn.register_forward_hook(lambda *_: None)
        return model

    def quantised():
        model = tiny()
        for projection in model.blocks[1].mlp.experts.modules():
            if isinstance(projection, nn.Linear):
                codes = torch.zeros(projection.weight.shape, dtype=torch.int8)
                projection.weight = nn.Parameter(codes, requires_grad=False)
        return model

    def unproven():
        model = tiny()
        experts = model.blocks[1].mlp.experts

        class Shifted(type(experts)):
            def forward(self, hidden, index, weight):
                total = torch.ones_like(hidden)  # added to what the experts give
                for expert, module in enumerate(self.blocks):
                    token, slot = torch.where(index == expert)
                    total.index_add_(0, token, module(hidden[token]) * weight[token, slot, None])
                return total

        experts.__class__ = Shifted
        return model

    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(3))

        def forward(self, x):
            return sum(layer(x) for layer in self.layers)

    def parallel_branches():
        return Parallel().eval(), (torch.zeros(2, 4),)

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
