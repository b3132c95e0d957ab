"""Render docs/performance.md's tables from the CPU benchmark's JSON.

    python docs/update_performance.py out/bench-cpu.json

The numbers go to docs/bench-cpu.json, or, if they are those of `--only export`, to docs/bench-export.json; the text
around the markers stays. Sections that a run leaves out stay too, in both, and with a run that leaves out the steps the
machine that heads the page; `machines` says which section comes from where.
"""

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE, NUMBERS, EXPORT = HERE / "performance.md", HERE / "bench-cpu.json", HERE / "bench-export.json"


def table(heading: str, rows: list[list[str]]) -> str:
    """A Markdown table whose first column is text."""
    columns = heading.split("|")
    lines = [f"| {' | '.join(part.strip() for part in columns)} |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def machine(found: dict[str, Any]) -> str:
    """One sentence about where the numbers come from."""
    m = found["machine"]
    return (
        f"{found['date']}, {m['processor']} ({m['capability']}), {m['threads']} threads, "
        f"torch {m['torch'].partition('+')[0]}: {m['fp32_gflops']:.0f} GFLOP/s in fp32 and {m['bf16_gflops']:.0f} in "
        f"bf16 for a product of 2048 x 1024 x 1024, {m['read_gbytes']:.0f} GB/s for a sum, "
        f"{m['copy_gbytes']:.0f} GB/s for a copy (bytes read and written)."
    )


def uncached(found: dict[str, Any]) -> str:
    """Original and vectorised model, fp32 and bf16, against the floor of its FLOPs."""
    rows = []
    for part in ("fp32", "bf16"):
        numbers = found["steps"][part]
        rates = found["machine"]  # bf16 may be widened to fp32
        rate = rates["fp32_gflops"] if part == "fp32" else max(rates["fp32_gflops"], rates["bf16_gflops"])
        floor = numbers["flops"] / rate / 1e6
        for name in ("original", "original compiled", "vectorised eager", "vectorised"):
            if name in numbers["ms"]:
                ms = numbers["ms"][name]
                rows.append(
                    [f"{part}: {name}", f"{ms:.0f}", f"{numbers['over_original'][name]:.2f}x", f"{floor / ms:.2f}"]
                )
    return table("model | ms | faster than eager original | floor over time", rows)


def cached(found: dict[str, Any]) -> str:
    """Steps of the cached model against their share of a full step's FLOPs."""
    numbers = found["steps"]["fp32"]
    rows = [
        ["full step", f"{numbers['ms']['full step']:.0f}", "1", "1", "", f"{numbers['of_vectorised']['full step']:.3f}"]
    ]
    for name, share in numbers["flops_of_full_step"].items():
        time = numbers["of_full_step"][name]
        cells = [f"{numbers['ms'][name]:.0f}", f"{share:.3f}", f"{time:.3f}", f"{time - share:+.3f}"]
        rows.append([name, *cells, f"{numbers['of_vectorised'][name]:.3f}"])
    return table(
        "step | ms | f: FLOPs of a full step's | time of a full step's | over f | time of the vectorised", rows
    )


def most_efficient(row: dict[str, Any], step_ms: float, read_gbytes: float) -> float:
    """Efficiency if FLOPs took their share of an uncached step and a cached step read what its cache holds once."""
    read = row["cache_bytes"] / read_gbytes / 1e6
    return 1 / (1 + row["flops_speedup"] * row["cached_share"] * read / step_ms)


def trajectories(found: dict[str, Any]) -> str:
    """Efficiency of every policy."""
    return _efficiencies(found, "trajectories")


def storage(found: dict[str, Any]) -> str:
    """The same with caches in the model's dtype and in bf16."""
    return _efficiencies(found, "storage")


def _efficiencies(found: dict[str, Any], section: str) -> str:
    parts = []
    read_gbytes = found.get("machines", {}).get(section, found["machine"])["read_gbytes"]
    for name, numbers in found[section].items():
        step_ms = numbers["policies"]["vectorised"]["ms"] / numbers["steps"]
        rows = [
            [
                f"`{policy}`",
                f"{row['over_original']:.2f}x",
                f"{row['speedup']:.2f}x",
                f"{row['flops_speedup']:.2f}x",
                f"{row['efficiency']:.2f}",
                f"{most_efficient(row, step_ms, read_gbytes):.2f}",
            ]
            for policy, row in numbers["policies"].items()
        ]
        heading = (
            f"{name}, batch {numbers['batch']} | over eager original | over vectorised | FLOPs | efficiency | at most"
        )
        parts.append(table(heading, rows))
    return "\n\n".join(parts)


def layers(found: dict[str, Any]) -> str:
    """Experts of one layer: time of a fraction over the larger of its two floors."""
    m = found["machine"]
    rows = []
    for name, numbers in found["layers"].items():
        if name == "linearity":
            continue
        cells = []
        for key, ms in numbers["ms"].items():
            fraction = int(key.rstrip("%")) / 100
            read = numbers["weight_bytes"] * numbers["experts_hit"][key] / numbers["experts"] / m["read_gbytes"] / 1e6
            floor = max(numbers["flops"] * fraction / m["fp32_gflops"] / 1e6, read)
            cells.append(f"{ms:.2f} ({floor / ms:.2f})" if fraction else f"{ms:.2f}")
        rows.append([name, *cells])
    keys = " | ".join(next(iter(found["layers"].values()))["ms"])
    return table(f"layer | {keys}", rows)


def linearity(found: dict[str, Any]) -> str:
    """Time against the number of tokens."""
    numbers = found["layers"]["linearity"]
    rows = [[f"{key}", f"{ms:.1f}", f"{numbers['of_linear'][key]:.2f}"] for key, ms in numbers["ms"].items()]
    return table("tokens | ms | of what the smallest number's time gives", rows)


def transforming(found: dict[str, Any]) -> str:
    """`transform` of a large model."""
    (numbers,) = found["transform"].values()
    weights, before, peak = (numbers[f"{key}_mib"] for key in ("weights", "before", "peak"))
    return (
        f"`transform` of {numbers['model']} ({weights:.0f} MiB of weights): {numbers['seconds']:.0f} s, not compiling; "
        f"the process holds {before:.0f} MiB before and {peak:.0f} MiB at its peak, {peak / before:.2f} times as much."
    )


def memory(found: dict[str, Any]) -> str:
    """Measured and estimated bytes of cache."""
    numbers = found["steps"]["fp32"]
    measured, estimated = numbers["cache_bytes"], numbers["estimated_cache_bytes"]
    held = f"{measured / 2**20:.1f} MiB held, {estimated / 2**20:.1f} MiB estimated"
    return f"Cache of {numbers['model']}, batch {numbers['batch']}: {held}."


def export_machine(found: dict[str, Any]) -> str:
    """Where the numbers of exported steps come from."""
    return machine(found)


def exported(found: dict[str, Any]) -> str:
    """Steps in onnxruntime: of each form's own full step, and that of the plain model's."""
    rows = []
    for part in (name for name in found["export"] if name.startswith("onnx")):
        for experts, numbers in found["export"][part].items():
            for form, over in numbers["full_over_plain"].items():
                cells = [f"{numbers['of_full_step'][f'{form}: {key}']:.3f}" for key in numbers["flops_of_full_step"]]
                rows.append([f"{part.removeprefix('onnx ')}, {experts}, {form}", f"{over:.2f}", *cells])
        allowed = [f"{share + 0.25:.3f}" for share in numbers["flops_of_full_step"].values()]
        rows.append([f"{part.removeprefix('onnx ')}: asked for, at most", "1.25", *allowed])
    return table("model, experts, graphs | full over plain | 0 % | 10 % | 50 %", rows)


def packaged(found: dict[str, Any]) -> str:
    """Packages of AOTInductor over the compiled model."""
    rows = []
    for part in (name for name in found["export"] if name.startswith("aoti")):
        numbers = found["export"][part]
        for key, value in numbers["of_compiled"].items():
            name = f"{part.removeprefix('aoti ')}: {key}"
            rows.append(
                [name, *(f"{numbers['ms'][f'{how}: {key}']:.1f}" for how in ("compiled", "package")), f"{value:.3f}"]
            )
    return table("step | compiled, ms | package, ms | package over compiled", rows)


PARTS = {
    **dict.fromkeys((machine, uncached, cached, memory), "steps"),
    **dict.fromkeys((layers, linearity), "layers"),
    **dict.fromkeys((export_machine, exported, packaged), "export"),
    trajectories: "trajectories",
    storage: "storage",
    transforming: "transform",
}
"""The parts of the page, each with the section of the numbers that it shows."""


def merged(before: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """The numbers so far with the sections of a run in their place."""
    heading = ("date", "machine", "minutes")
    sections = {key: value for key, value in found.items() if key not in heading}
    machines = before.get("machines", {}) | dict.fromkeys(sections, found["machine"])
    head = {key: found[key] for key in heading} if "steps" in found or "export" in found else {}
    return before | head | sections | {"machines": machines}


def render(page: str, found: dict[str, Any]) -> str:
    """The page with every part renewed whose section is in the numbers."""
    for part in (part for part, section in PARTS.items() if section in found):
        begin, end = f"<!-- {part.__name__}:begin -->\n", f"<!-- {part.__name__}:end -->"
        before, _, rest = page.partition(begin)
        _, _, after = rest.partition(end)
        page = before + begin + part(found) + "\n" + end + after
    return page


def main() -> None:
    """Renew the page and the numbers beside it."""
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else NUMBERS
    found = json.loads(source.read_text())
    kept = EXPORT if "export" in found else NUMBERS
    page = render(PAGE.read_text(), found)
    PAGE.write_text(page)
    if source != kept:
        kept.write_text(json.dumps(merged(json.loads(kept.read_text()), found), indent=1) + "\n")


if __name__ == "__main__":
    main()
