"""An exported artefact on the terminal: what `moeca_fx.export.description` found, as tables."""

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moeca_fx.export.description import ArtefactDescription, Contents, GraphDescription
from moeca_fx.export.graph import Port
from moeca_fx.export.manifest import describe_port
from moeca_fx.policies.registry import NAME_KEY
from moeca_fx.sizes import readable, readable_bytes

Facts = dict[str, str]
"""Label -> text; an empty text is left out."""

_TIMES = "\N{MULTIPLICATION SIGN}"
"""Without spaces: an operator and its count stay on one line."""


def print_artefact(console: Console, name: str, found: ArtefactDescription) -> None:
    """Print a description.

    Args:
        name: of the folder, as it was given.
    """
    _print_facts(console, f"Artefact {name}: {found.kind}", _summary(found))
    for graph in found.graphs:
        console.print()
        title = f"Graph {graph.name} ({graph.file}, {readable_bytes(graph.bytes)}): {_steps(graph)}"
        _print_facts(console, title, _facts(graph, found))
    if found.cache.sites:
        console.print()
        console.print(_cache_table(found))
    console.print()
    console.print(_cost_table(found))
    for note in _notes(found):
        console.print(Text(note))


def _summary(found: ArtefactDescription) -> Facts:
    manifest = found.manifest
    least, best, most = manifest.batch
    capabilities = ", ".join(manifest.compute_capabilities)
    return {
        "model": f"{manifest.model}, {manifest.dtype}, weights {manifest.weights}",
        "call": _ports(found.inputs),
        "batch": f"{least}" if least == most else f"{least} to {most}, best {best}",
        "policy": _policy(manifest.policy),
        "made with": ", ".join(f"{package} {version}" for package, version in manifest.versions.items()),
        "opset": "" if manifest.opset is None else str(manifest.opset),
        "GPUs": f"compute capability {capabilities}" if capabilities else "",
        "files": ", ".join(f"{name} {readable_bytes(size)}" for name, size in found.files),
    }


def _policy(policy: dict[str, object] | None) -> str:
    if policy is None:
        return "none: without caches"
    return f"{policy[NAME_KEY]}: {', '.join(f'{key} {value}' for key, value in policy.items() if key != NAME_KEY)}"


def _steps(graph: GraphDescription) -> str:
    parts = []
    for step, force in graph.steps:
        called = f"the {step} step" if step else "every step"
        parts.append(called if force is None else f"{called} (force {force})")
    return " and ".join(parts) or "no step runs it"


def _facts(graph: GraphDescription, found: ArtefactDescription) -> Facts:
    contents = graph.contents
    return {
        "takes": _ports(graph.inputs, len(graph.caches_in)),
        "gives": _ports(graph.outputs, len(graph.caches_out)),
        "nodes": f"not known: {graph.note}" if contents is None else _operators(contents),
        "tensors": "" if contents is None else _tensors(contents),
        "TensorRT": _tensorrt(graph, found),
    }


def _ports(ports: Iterable[Port], caches: int = 0) -> str:
    """``x [batch, 1, 8, 8] float32``, and how many caches there are besides."""
    parts = []
    for port in ports:
        item = describe_port(port)
        parts.append(f"{item['name']} [{', '.join(map(str, item['shape']))}] {item['dtype']}")
    return ", ".join([*parts, *([_many(caches, "cache")] if caches else [])])


def _operators(contents: Contents) -> str:
    return f"{contents.nodes}: {', '.join(f'{operator}{_TIMES}{count}' for operator, count in contents.operators)}"


def _tensors(contents: Contents) -> str:
    numbers = readable(contents.values, "").rstrip()
    return f"{contents.tensors} weights and constants, {numbers} numbers, {readable_bytes(contents.bytes)}"


def _tensorrt(graph: GraphDescription, found: ArtefactDescription) -> str:
    if graph.rejections is None:
        return "" if found.manifest.kind != "onnx" else f"not asked: {found.note}"
    if not graph.rejections:
        return f"{found.tensorrt} takes every node"
    return "\n".join([f"{found.tensorrt} refuses the graph:", *map(str, graph.rejections)])


def _cache_table(found: ArtefactDescription) -> Table:
    table = _table("Caches, one sample")
    table.add_column("site", style="cyan", overflow="fold")
    table.add_column("holds", overflow="fold")
    table.add_column("cache", justify="right", no_wrap=True)
    for site, size in found.cache.sites:
        held = [name.removeprefix(f"{site}.") for name, _ in found.cache.states if name.startswith(f"{site}.")]
        table.add_row(Text(site), Text(", ".join(held)), readable_bytes(size))
    table.add_row("in all", _many(len(found.cache.states), "cache"), readable_bytes(found.cache.total), style="bold")
    return table


def _cost_table(found: ArtefactDescription) -> Table:
    table = _table("Costs of a call")
    cached = bool(found.cache.sites)
    steps = [name for name, _ in found.batches[0].flops]
    for heading in ("batch", *(("cache", "while it runs") if cached else ()), *steps):
        table.add_column(heading, justify="right")
    for cost in found.batches:
        sizes = (cost.cache_bytes, cost.running_bytes) if cached else ()
        flops = [readable(count, "FLOPs") for _, count in cost.flops]
        table.add_row(str(cost.batch), *map(readable_bytes, sizes), *flops)
    return table


def _notes(found: ArtefactDescription) -> Iterable[str]:
    if found.cache.sites:
        yield "While it runs: caches that a step replaces are two sets of buffers, what it reads and what it writes."
        in_place = {name for graph in found.graphs for name in graph.in_place}
        if in_place:
            of = len(found.manifest.caches)
            yield f"On a CPU {len(in_place)} of {of} caches are written in place, so there is one set of them."
        lists = sum(graph.lists for graph in found.graphs)
        if lists:
            yield f"The lengths of {_many(lists, 'list')} are inputs: a step that needs more of one runs again."
        rules = [name for name, _ in found.batches[0].flops if name not in ("uncached", "full", "probe")]
        if rules:
            yield f"FLOPs of {', '.join(rules)}: the fixed part; what the step recomputes comes on top."


def _print_facts(console: Console, title: str, facts: Facts) -> None:
    console.print(Text(title, "bold"))
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="cyan", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, text in facts.items():
        if text:
            grid.add_row(f"  {label}", Text(text))
    console.print(grid)


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", pad_edge=False, box=None)


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
