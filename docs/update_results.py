"""Copy a demo's picture and numbers here and rewrite the results section of the README from them.

Usage: python docs/update_results.py out/demo (or `make results`, which runs the demo first)
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from moeca_fx.demo.result import VariantResult
from moeca_fx.demo.table import HEADINGS, table_cells

DOCS = Path(__file__).resolve().parent
README = DOCS.parent / "README.md"
BEGIN, END = "<!-- results:begin -->\n", "<!-- results:end -->\n"


def results_section(record: dict[str, Any]) -> str:
    """The text between the markers, from the content of ``demo.json``."""
    settings, versions = record["settings"], record["versions"]
    torch_version = versions["torch"].partition("+")[0]
    parameters = record["model"]["parameters"] / 1e6
    variants = [VariantResult.from_dict(variant) for variant in record["variants"]]
    compiled = record["environment"]["torch_compile"]
    lines = [
        f"`make demo`: the shipped digits model ({parameters:.1f} M parameters, 16 experts, top-4),",
        f"{settings['batch']} images, {settings['steps']} Euler steps, the same noise for all, on",
        f"a CPU (threads: {settings['threads']}) in float32 with torch {torch_version}; the original eager, ours",
        f"{'compiled' if compiled else 'eager too'}; medians of {settings['repeats']} interleaved trajectories.",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|---" + "|---:" * (len(HEADINGS) - 1) + "|",
        *("| " + " | ".join(table_cells(variant)) + " |" for variant in variants),
        "",
        "PSNR and SSIM compare with the original's images. Class accuracy is the share of samples that a",
        "classifier trained on the real digits reads as the class that was asked for. Reuse is the share of",
        "the routed branches of cached steps that were not computed.",
        "",
        "![Samples of the original, the vectorised and the cached model, and their differences](docs/demo.png)",
    ]
    return "\n".join(lines) + "\n"


def main(folder: Path) -> None:
    """Update the README and this folder from `folder`."""
    for name in ("demo.json", "demo.png"):
        shutil.copyfile(folder / name, DOCS / name)
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    section = results_section(json.loads((DOCS / "demo.json").read_text(encoding="utf-8")))
    README.write_text(before + BEGIN + section + END + after, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
