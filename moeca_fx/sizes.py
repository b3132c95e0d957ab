"""Sizes in bytes, as text: ``500MB``, ``1.2GiB``."""

import re

_UNITS = {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_bytes(text: str) -> float | None:
    """Bytes of a number with a unit (B, kB, MB, GB, KiB, MiB, GiB in any case); None when it is none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?b|b)", text.strip().lower())
    return float(match[1]) * _UNITS[match[2]] if match else None


def readable_bytes(count: int) -> str:
    """Bytes in decimal units, three digits: ``"12.3 MB"``."""
    return readable(count, "B")


def readable(count: int, unit: str) -> str:
    """A count in decimal units, three digits: ``"12.3 GFLOPs"``."""
    amount, prefix = float(count), ""
    for larger in ("k", "M", "G", "T"):
        if amount < 999.5:
            break
        amount, prefix = amount / 1000, larger
    return f"{amount:.3g} {prefix}{unit}"
