"""The bench's numbers as JSON, CSV and table cells."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moeca_fx.bench.margins import margins
from moeca_fx.bench.run import Row
from moeca_fx.bench.settings import BenchSettings
from moeca_fx.bench.subject import Subject
from moeca_fx.files import write_whole
from moeca_fx.provenance import provenance

HEADINGS = (
    "run",
    "FLOPs x",
    "time x",
    "vect. x",
    "full",
    "PSNR",
    "median",
    "SSIM",
    "FID",
    "IS",
    "acc %",
    "reuse %",
    "match %",
    "MB",
)
GROUPS = ("baseline", "peer", "paper", "ours")


def ordered(rows: Sequence[Row]) -> list[Row]:
    """By group, then family as in the suite, then speed-up; what was refused last."""
    families = list(dict.fromkeys(row.entry.family for row in rows))

    def rank(row: Row) -> tuple[bool, int, int, float]:
        entry, quality = row.entry, row.quality
        speedup = quality.flops_speedup if quality is not None else 0.0
        return quality is None, GROUPS.index(entry.group), families.index(entry.family), speedup

    return sorted(rows, key=rank)


def cells(row: Row) -> tuple[str, ...]:
    """One line of the table, a cell for each of `HEADINGS`; ``-`` where there is no number."""
    quality, latency = row.quality, row.latency
    if quality is None:
        return (row.entry.name, *["-"] * (len(HEADINGS) - 1))
    return (
        row.entry.name,
        f"{quality.flops_speedup:.2f}",
        _number(latency.speedup if latency else None, ".2f"),
        _number(latency.over_vectorised if latency else None, ".2f"),
        f"{quality.full_steps:.4g}",
        "equal" if quality.psnr is None else f"{quality.psnr:.1f}",
        "equal" if quality.psnr_median is None else f"{quality.psnr_median:.1f}",
        f"{quality.ssim:.4f}",
        _number(quality.fid, ".2f"),
        _number(quality.inception, ".2f"),
        _percent(quality.accuracy),
        _percent(quality.reuse_ratio),
        _percent(quality.match_ratio),
        _number(quality.cache_bytes / 1e6 or None, ".1f"),
    )


def document(rows: Sequence[Row], subject: Subject, settings: BenchSettings) -> dict[str, Any]:
    """Everything found, with what is needed to repeat it; holds no host name and no path."""
    return {
        "target": subject.name,
        "weights": subject.fingerprint,
        "parameters": sum(parameter.numel() for parameter in subject.model.parameters()),
        "settings": asdict(settings),
        **provenance(),
        "rows": [_record(row) for row in ordered(rows)],
        "margins": [margin.as_dict() for margin in margins(rows)],
    }


def write_numbers(content: dict[str, Any], folder: Path, name: str = "bench") -> tuple[Path, Path]:
    """Write `document` as JSON and its rows as CSV, each whole or not at all.

    Raises:
        MoecaError: the file system refused.
    """
    numbers, table = folder / f"{name}.json", folder / f"{name}.csv"
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_whole(numbers, lambda path: path.write_text(text, encoding="utf-8"))
    sheet = _sheet(content["rows"])
    write_whole(table, lambda path: path.write_text(sheet, encoding="utf-8"))
    return numbers, table


def _record(row: Row) -> dict[str, Any]:
    entry = row.entry
    head = {"name": entry.name, "family": entry.family, "group": entry.group, **entry.key()}
    latency = None if row.latency is None else row.latency.as_dict()
    return head | {"quality": row.quality and row.quality.as_dict(), "latency": latency, "refused": row.refused}


def _sheet(records: list[dict[str, Any]]) -> str:
    """Flat columns; nested values one a column, what is missing empty."""
    flat = []
    for record in records:
        line = {name: value for name, value in record.items() if name not in ("quality", "latency", "fields")}
        line["fields"] = json.dumps(record["fields"])
        for part in ("quality", "latency"):
            line |= {f"{part}_{name}": value for name, value in (record[part] or {}).items() if name != "seconds"}
        flat.append(line)
    columns = list(dict.fromkeys(name for line in flat for name in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
