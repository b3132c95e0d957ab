"""The command itself: version, help, missing extras, and files that are written whole or not at all."""

import subprocess
import sys

import pytest

import moeca_fx
from moeca_fx.errors import MoecaError
from moeca_fx.files import write_whole
from tests.helpers.grids import slow

WITHOUT_TYPER = """
import sys
sys.modules["typer"] = None  # what Python does for a package that is not installed
from moeca_fx.cli import main
main()
"""

WITHOUT_NUMPY = """
import sys
for name in ("numpy", "onnx", "onnx_ir", "onnxscript", "onnxruntime"):  # what the extras beyond `cli` bring
    sys.modules[name] = None
import moeca_fx.export, moeca_fx.zoo
from moeca_fx.cli import main
sys.argv = ["moeca-fx", "--version"]
main()
"""


def test_version(run):
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"moeca-fx {moeca_fx.__version__}\n")


def test_help_names_the_commands(run):
    result = run("--help")
    assert result.exit_code == 0
    for command in ("demo", "inspect", "sample"):
        assert command in result.stdout


def test_unknown_commands_and_options_exit_with_2(run):
    assert run("fly").exit_code == 2
    assert run("inspect").exit_code == 2
    assert run("inspect", "digits", "--what").exit_code == 2


def test_the_command_needs_no_other_extra_to_start():
    done = subprocess.run([sys.executable, "-c", WITHOUT_NUMPY], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"moeca-fx {moeca_fx.__version__}\n"), done.stderr


def test_without_the_extra_the_command_names_it():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TYPER], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "pip install 'moeca_fx[cli]'" in done.stderr
    assert "Traceback" not in done.stderr


WITHOUT_DEMO_PACKAGES = """
import sys
for package in ("PIL", "sklearn", "torchmetrics"):
    sys.modules[package] = None
from moeca_fx.cli import main
main()
"""


@pytest.mark.parametrize(
    "arguments", [pytest.param(("demo",), id="demo"), slow(("sample", "tiny_models:tiny"), id="sample")]
)
def test_without_the_demo_extra_the_command_names_it(project, arguments):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_DEMO_PACKAGES, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "pip install 'moeca_fx[demo]'" in done.stderr
    assert not (project / "out").exists()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "result.json"
    target.write_text("old")

    def write(path):
        path.write_text("half")
        raise ValueError("stopped in the middle")

    with pytest.raises(ValueError, match="stopped in the middle"):
        write_whole(target, write)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_refused_write_says_where(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(MoecaError, match=r"cannot write .*taken"):
        write_whole(tmp_path / "taken", lambda path: path.write_text("x"))
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
