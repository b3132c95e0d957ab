"""The READMEs beside the trained models are true: their code runs, their commands name modules that exist."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

import moeca_fx.zoo
from moeca_fx.zoo.training.task import TASKS

PAGES = {name: Path(moeca_fx.zoo.__file__).parent / name / "README.md" for name in TASKS}


@pytest.mark.parametrize("name", PAGES)
def test_every_python_block_runs(name, capsys, trained):
    trained(name)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGES[name].read_text(), flags=re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, str(PAGES[name]), "exec"), {})
    assert capsys.readouterr().out


@pytest.mark.parametrize("name", PAGES)
def test_every_command_is_a_module_and_names_the_model(name):
    commands = re.findall(r"python -m (\S+) (.*)", PAGES[name].read_text())
    assert {module for module, _ in commands} >= {"moeca_fx.zoo.training.judge"}
    for module, arguments in commands:
        assert find_spec(module) is not None, module
        assert f"--model {name}" in arguments
