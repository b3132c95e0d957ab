"""The README is true: its code runs, its table is the demo's, its links and its tree exist."""

import importlib.util
import inspect
import json
import re
from pathlib import Path

import pytest

import moeca_fx
from moeca_fx.passes import PIPELINE
from tests.helpers.grids import slow
from tests.helpers.zoo_models import shallow_digits

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


def _blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    ("page", "shallow"),
    [pytest.param(README, True, id="README.md-shallow"), *(slow(page, False, id=page.name) for page in PAGES)],
)
def test_every_python_block_runs(page, shallow, capsys, monkeypatch):
    if shallow:  # the digits model has blocks of two kinds; one of each will do
        monkeypatch.setattr(moeca_fx.zoo, "build", {"digits": shallow_digits()}.__getitem__)
    names = {}
    for block in _blocks(page, "python"):
        exec(compile(block, page.name, "exec"), names)
    if page == README:
        assert "reuse" in capsys.readouterr().out  # the statistics were printed
        assert names["fast"].stats().reuse_ratio > 0


def test_the_results_table_is_the_demos():
    script = ROOT / "docs" / "update_results.py"
    spec = importlib.util.spec_from_file_location("update_results", script)
    update = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(update)
    record = json.loads((ROOT / "docs" / "demo.json").read_text())
    assert update.BEGIN + update.results_section(record) + update.END in README.read_text()


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_local_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


def test_the_tree_names_what_exists():
    tree = README.read_text().partition("## The tree")[2].partition("## ")[0]
    inside = re.findall(r"^  ([\w.]+/?) ", tree, flags=re.MULTILINE)
    assert inside, "the tree was not found"
    assert [name for name in inside if not (ROOT / "moeca_fx" / name).exists()] == []
    packages = {f"{path.parent.name}/" for path in (ROOT / "moeca_fx").glob("*/__init__.py")}
    assert packages - set(inside) == set()


def test_the_diagram_shows_the_pipeline():
    diagram = README.read_text().partition("## How it works")[2].partition("1. **discover**")[0]
    passes = ["discover", *(name for name, _ in PIPELINE)]
    assert re.findall(r"─▶ (\w+)(?= ─)", diagram) == passes
    listed = re.findall(r"^\d+\. \*\*(\w+)\*\*", README.read_text(), flags=re.MULTILINE)
    assert listed == passes


def test_the_cached_step_is_described_with_operations_it_has():
    section = README.read_text().partition("### How a cached step works")[2].partition("\n## ")[0]
    before, after = re.findall(r"^```\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
    model = moeca_fx.zoo.build("digits")
    graphs = moeca_fx.inspect(model, moeca_fx.zoo.example_inputs(model)).graphs
    for text, stage in ((before, "vectorize_experts"), (after, "insert_cache.cached")):
        named = set(re.findall(r"(\w+)\(", text)) - {"norm2"}  # abridged: the norm and its modulation
        graph = graphs[stage]
        assert sorted(name for name in named if f"{name}(" not in graph) == []
    states = set(re.findall(r"cache_(\w+)", after))
    assert {name for name in states if f"_{name} = input" not in graphs["insert_cache.cached"]} == set()


def test_the_configuration_table_names_every_field():
    table = README.read_text().partition("## Configuration")[2].partition("## ")[0]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| `")]
    documented = {}
    for row in rows:
        names = re.findall(r"`(\w+)`", row[1])
        documented |= dict(zip(names, row[2].strip().split(", "), strict=True))
    defaults = moeca_fx.MoECa().as_dict().items()
    assert documented == {name: f'`"{value}"`' if isinstance(value, str) else str(value) for name, value in defaults}


def test_the_memory_table_names_every_option():
    table = README.read_text().partition("\n## Memory")[2].partition("\n## ")[0]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| `")]
    documented = {row[1].strip(" `"): row[2].strip() for row in rows}
    parameters = inspect.signature(moeca_fx.transform).parameters
    options = [name for name in parameters if name.startswith("cache_") or name == "chunk"]
    assert documented == {name: str(parameters[name].default) for name in options}


def test_the_version_is_the_same_everywhere():
    metadata = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{moeca_fx.__version__}"' in metadata
