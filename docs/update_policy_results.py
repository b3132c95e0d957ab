"""Write docs/results.md from bench runs: ``python docs/update_policy_results.py BENCH_FOLDER``.

Every folder ``TARGET-SAMPLER-STEPS`` that ``moeca-fx bench --out BENCH_FOLDER`` wrote becomes a section: how far our
policies are ahead of the best peer, the best setting of every family at each speed-up, and its figure. The text around
the sections is in docs/results_notes.md, which holds findings and what did not work; a table of all margins takes the
place of its line ``<!-- margins -->``.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from moeca_fx.bench.margins import TARGETS
from moeca_fx.bench.suite import suite
from moeca_fx.tuning.target import SLACK

DOCS = Path(__file__).parent
MARGINS = "<!-- margins -->"
AIM = {"euler": 3.0, "ancestral": 1.0}
"""Margin in dB that a recommended policy should have with a sampler."""
FIGURES = {
    "quality_vs_flops*.png": "quality against FLOPs",
    "quality_vs_latency*.png": "quality against time",
    "reuse.png": "share of reused branches at each step (the paper's Fig. 8)",
    "drift.png": "drift of attention and experts by layer and step (Fig. 9)",
    "experts-*.png": "which experts the tokens of an image choose, last MoE layer (Fig. 4)",
    "study-hyperparameters.png": "MoECa's hyperparameters (Fig. 7)",
    "study-score.png": "terms of MoECa's score (Table 4)",
    "study-lambdas-tau0-0.8.png": "weights of the score (Table 5), at the published threshold",
    "study-lambdas-tau0-0.4.png": "weights of the score (Table 5), at a threshold that decides something",
}
"""Pattern of a figure's file, the last of several in order, and what it shows."""


def number(value: float | None, form: str = ".1f") -> str:
    """A number, or a dash where there is none."""
    return "-" if value is None else format(value, form)


def summary(contents: list[dict[str, Any]]) -> list[str]:
    """All margins: one line a run, by the pooled PSNR and, in brackets, by the median image; bold below the aim."""
    lines = [
        "| model, sampler, steps | images | " + " | ".join(f"{target:g}x" for target in TARGETS) + " | FID change |",
        "|---|---:|" + "---:|" * len(TARGETS) + "---:|",
    ]
    for content in contents:
        settings = content["settings"]
        cells, changes = [], []
        for margin in content["margins"]:
            ahead, median = margin["margin"], margin["margin_median"]
            text = number(ahead, "+.1f")
            below = ahead is not None and ahead < AIM[settings["sampler"]]
            cells.append((f"**{text}**" if below else text) + f" ({number(median, '+.1f')})")
            changes += [] if margin["fid_change"] is None else [margin["fid_change"]]
        fid = f"{min(changes):+.2f} to {max(changes):+.2f}" if changes else "-"
        name = f"{content['target']}, {settings['sampler']}, {settings['steps']}"
        lines.append(f"| {name} | {settings['samples']} | " + " | ".join(cells) + f" | {fid} |")
    return lines


def margin_table(content: dict[str, Any]) -> list[str]:
    """Ours against the best peer at each speed-up."""
    lines = [
        "| FLOPs at least | ours | PSNR | best peer | PSNR | margin dB | between settings dB | median image dB "
        "| FID, ours minus peer |",
        "|---|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for margin in content["margins"]:
        ours = f"{margin['ours'] or '-'} ({number(margin['ours_speedup'], '.2f')}x)"
        peer = f"{margin['peer'] or '-'} ({number(margin['peer_speedup'], '.2f')}x)"
        lines.append(
            f"| {margin['target']:g}x | {ours} | {number(margin['ours_psnr'])} "
            f"| {peer} | {number(margin['peer_psnr'])} "
            f"| {number(margin['margin'], '+.1f')} | {number(margin['margin_between'], '+.1f')} "
            f"| {number(margin.get('margin_median'), '+.1f')} "
            f"| {number(margin['fid_change'], '+.2f')} |"
        )
    return lines


def family_table(content: dict[str, Any]) -> list[str]:
    """The best PSNR of every family at each speed-up, and the median image of that run."""
    best: dict[str, dict[float, dict[str, Any]]] = {}
    for row in content["rows"]:
        quality = row.get("quality")
        if row["group"] == "baseline" or not quality or quality["psnr"] is None:
            continue
        family = "ours, expert branches" if row["name"].startswith("ours branch") else row["family"]
        for target in TARGETS:
            if quality["flops_speedup"] >= target * (1 - SLACK):
                held = best.setdefault(family, {}).get(target)
                if held is None or quality["psnr"] > held["psnr"]:
                    best[family][target] = quality | {"name": row["name"]}
    lines = [
        "| PSNR dB (median image) at | " + " | ".join(f"{t:g}x" for t in TARGETS) + " |",
        "|---|" + "---:|" * len(TARGETS),
    ]
    for family, points in best.items():
        cells = [f"{points[t]['psnr']:.1f} ({points[t]['psnr_median']:.1f})" if t in points else "-" for t in TARGETS]
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    return lines


def command(content: dict[str, Any]) -> str:
    """The command that makes a section, but for its policy files."""
    settings = content["settings"]
    words = [f"moeca-fx bench {content['target']} --steps {settings['steps']} --sampler {settings['sampler']}"]
    words.append(f"--batch {settings['batch']} --samples {settings['samples']} --threads {settings['threads']}")
    ran = {row["name"] for row in content["rows"]}
    listed = [e for e in suite(settings["steps"], settings["sampler"] != "euler") if e.group in ("peer", "paper")]
    chosen = []
    for family in dict.fromkeys(entry.family for entry in listed):
        names = [entry.name for entry in listed if entry.family == family]
        found = [name for name in names if name in ran]
        chosen += [family] if found == names else found
    if any(entry.name not in ran for entry in listed):
        words.append(f'--policies "{",".join(chosen)}"')
    if not any(row.get("latency") for row in content["rows"]):
        words.append("--no-latency")
    return " ".join(words)


def section(folder: Path, content: dict[str, Any]) -> list[str]:
    """One bench run: its folder and what its bench.json holds."""
    settings = content["settings"]
    name = f"{content['target']}, {settings['steps']} {settings['sampler']} steps"
    lines = [f"## {name}", ""]
    lines += [
        f"{settings['samples']} images of classes with odd numbers, noise seed {settings['seed']}; calibrated on other "
        f"latents of even classes. torch {content['versions']['torch']}, Python {content['versions']['python']}, CPU "
        f"({content['environment']['cpu_capability']}), fp32, threads: {settings['threads']}. With the policy files:",
        "",
        f"    {command(content)}",
        "",
        *margin_table(content),
        "",
        *family_table(content),
        "",
    ]
    shown = DOCS / "results"
    shown.mkdir(exist_ok=True)
    for pattern, caption in FIGURES.items():
        for figure in sorted(folder.glob(pattern))[-1:]:
            target = shown / f"{folder.name}-{figure.name}"
            shutil.copyfile(figure, target)
            lines += [f"{name}: {caption}", "", f"![{caption}](results/{target.name})", ""]
    shutil.copyfile(folder / "bench.csv", shown / f"{folder.name}.csv")
    lines += [f"All runs: [{folder.name}.csv](results/{folder.name}.csv)", ""]
    return lines


def in_order(folder: Path) -> tuple[str, bool, int]:
    """Model, deterministic samplers first, steps."""
    target, sampler, steps = folder.name.rsplit("-", 2)
    return target, sampler != "euler", int(steps)


def main() -> None:
    """Write the page."""
    if len(sys.argv) != 2:
        raise SystemExit("usage: python docs/update_policy_results.py BENCH_FOLDER")
    folders = sorted((path.parent for path in Path(sys.argv[1]).glob("*/bench.json")), key=in_order)
    if not folders:
        raise SystemExit(f"error: no bench.json in the folders of {sys.argv[1]}; run moeca-fx bench --out there first")
    notes = (DOCS / "results_notes.md").read_text(encoding="utf-8").rstrip()
    contents = [json.loads((folder / "bench.json").read_text(encoding="utf-8")) for folder in folders]
    lines = [notes.replace(MARGINS, "\n".join(summary(contents))), ""]
    for folder, content in zip(folders, contents, strict=True):
        lines += section(folder, content)
    (DOCS / "results.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    print(f"{DOCS.name}/results.md: {len(folders)} sections")


if __name__ == "__main__":
    main()
