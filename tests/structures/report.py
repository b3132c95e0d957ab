"""`python -m tests.structures.report`: examine the whole sample and write docs/structures.md."""

import sys
import time
from pathlib import Path

from tests.structures.reasons import REASONS
from tests.structures.results import PROCESSES, Results, run

PAGE = Path(__file__).resolve().parents[2] / "docs" / "structures.md"


def page(results: Results, minutes: float) -> str:
    """The page's text."""
    lines = [
        "# Structures: what transforms",
        "",
        "Written by `python -m tests.structures.report`; do not edit. Each structure is a tiny mixture-of-experts",
        "diffusion transformer, written as source code in a way that public code is; the axes, and which combinations",
        "make sense, are in `tests/structures/structure.py`. The sample holds every pair of values",
        "that can go together. Transformed means: full steps, forced-full trajectories and cached steps that recompute",
        "everything equal the original within 1e-5 on new inputs and batch sizes, a cached trajectory reuses branches,",
        "and a sample alone takes the same trajectory as in a batch. Refused means: an error with a documented",
        "reason, and nothing changed.",
        "",
        f"**{results.summary()}.** {minutes:.0f} minutes in {PROCESSES} processes.",
        "",
        "| axis | value | structures | transformed | share |",
        "|---|---|---|---|---|",
    ]
    for share in results.by_value():
        percent = f"{100 * share.transformed / share.total:.0f} %" if share.total else "none"
        lines.append(f"| {share.axis} | {share.value} | {share.total} | {share.transformed} | {percent} |")
    lines += ["", "| documented reason | what is refused | error | structures |", "|---|---|---|---|"]
    for reason in REASONS:
        count = sum(o.verdict == "refused" and o.reason == reason for _, _, o in results.outcomes)
        lines.append(f"| {reason} | {reason.meaning} | `{reason.error}` | {count} |")
    return "\n".join([*lines, ""])


def main() -> int:
    start = time.perf_counter()
    results = run()
    text = page(results, (time.perf_counter() - start) / 60)
    PAGE.write_text(text)
    sys.stdout.write(text)
    sys.stdout.writelines(f"{line}\n" for line in results.broken)
    return 1 if results.broken else 0


if __name__ == "__main__":
    sys.exit(main())
