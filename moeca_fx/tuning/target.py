"""What a search aims at: ``3x`` fewer FLOPs, at least ``40dB``, at most ``1.2GB`` of cache, or several of them."""

import math
import re
from dataclasses import dataclass

from moeca_fx.errors import ConfigError
from moeca_fx.sizes import parse_bytes

_NUMBER = r"(\d+(?:\.\d+)?)\s*"
DEFAULT_SPEEDUP = 3.0
"""Of a target that is a cache size alone."""
SLACK = 0.005
"""Relative: a speed-up may fall short by the rounding of a step."""


@dataclass(frozen=True)
class Target:
    """Bounds; None is no bound. With a speed-up the search maximises PSNR, else it maximises the speed-up.

    A cache size alone does not say which: it is taken with a speed-up of `DEFAULT_SPEEDUP`.

    Attributes:
        speedup: at least this many times fewer FLOPs than the uncached model.
        psnr: at least this PSNR in dB against the uncached model's images.
        cache_bytes: at most this many bytes of cache for the calibration batch.
    """

    speedup: float | None = None
    psnr: float | None = None
    cache_bytes: float | None = None

    def __post_init__(self) -> None:
        if self.speedup is None and self.psnr is None and self.cache_bytes is None:
            raise ConfigError(
                "target: expected a speed-up such as '3x', a quality such as '40dB' or a cache size such as '1.2GB', "
                "found none; give one"
            )
        if self.cache_bytes is not None and self.cache_bytes <= 0:
            raise ConfigError(f"target: expected a cache size above 0 bytes, found {self.cache_bytes:g}")
        if self.speedup is None and self.psnr is None:
            object.__setattr__(self, "speedup", DEFAULT_SPEEDUP)
        if self.speedup is not None and self.speedup <= 1:
            raise ConfigError(f"target: expected a speed-up above 1x, found {self.speedup:g}x")

    def __str__(self) -> str:
        parts = [
            f"{self.speedup:g}x fewer FLOPs" if self.speedup is not None else "",
            f"at least {self.psnr:g} dB" if self.psnr is not None else "",
            f"at most {self.cache_bytes / 1e6:g} MB of cache" if self.cache_bytes is not None else "",
        ]
        return ", ".join(part for part in parts if part)

    def met(self, speedup: float, psnr: float, cache_bytes: float) -> bool:
        """Whether a result is within all bounds; a speed-up may fall short by `SLACK`."""
        fast = self.speedup is None or speedup >= self.speedup * (1 - SLACK)
        good = self.psnr is None or psnr >= self.psnr
        return fast and good and (self.cache_bytes is None or cache_bytes <= self.cache_bytes)

    def shortfall(self, speedup: float, psnr: float, cache_bytes: float) -> float:
        """How far a result is from the bounds, in dB: of PSNR, and of the ratios of speed-up and cache (20 log10)."""
        slow = 0.0 if self.speedup is None else max(0.0, 20 * math.log10(self.speedup / speedup))
        poor = 0.0 if self.psnr is None else max(0.0, self.psnr - psnr)
        large = 0.0 if self.cache_bytes is None else max(0.0, 20 * math.log10(max(cache_bytes, 1) / self.cache_bytes))
        return slow + poor + large


def parse_target(text: str) -> Target:
    """Read ``3x``, ``40dB``, ``1.2GB``, or several separated by commas.

    Raises:
        ConfigError: a part is none of these, or given twice.
    """
    found: dict[str, float] = {}
    for part in (part.strip() for part in text.split(",")):
        name, value = _parse_part(part)
        if name in found:
            raise ConfigError(f"target {text!r}: {name} is given twice; give it once")
        found[name] = value
    return Target(**found)


def _parse_part(part: str) -> tuple[str, float]:
    lowered = part.lower()
    if match := re.fullmatch(_NUMBER + "x", lowered):
        return "speedup", float(match[1])
    if match := re.fullmatch(_NUMBER + "db", lowered):
        return "psnr", float(match[1])
    if (size := parse_bytes(part)) is not None:
        return "cache_bytes", size
    raise ConfigError(
        f"target: expected parts like '3x' (FLOPs), '40dB' (PSNR) or '1.2GB' (cache), found {part!r}; write for "
        "example '3x' or '40dB,500MB'"
    )
