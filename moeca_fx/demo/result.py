"""What the demo found: frozen records and their JSON form."""

import math
import statistics
from dataclasses import asdict, dataclass
from typing import Any

import torch

from moeca_fx.demo.settings import DemoSettings
from moeca_fx.provenance import provenance
from moeca_fx.runtime.compiler import why_not_compiled


@dataclass(frozen=True)
class VariantResult:
    """Numbers of one variant.

    Attributes:
        name: ``original``, ``vectorised`` or ``cached``.
        seconds: wall-clock seconds of a trajectory, one value a round.
        speedup: median over the rounds of the original's time over this one's.
        flops_speedup: FLOPs of the uncached model over the FLOPs executed.
        psnr: dB against the original's images over the whole batch; infinite when equal.
        psnr_worst: dB of the worst image.
        ssim: structural similarity against the original's images.
        accuracy: share of the images that a classifier trained on real digits reads as their class.
        reuse_ratio: share of the routed branches of cached steps that were reused; None without a cache.
        cache_bytes: bytes of cached state; 0 without a cache.
    """

    name: str
    seconds: tuple[float, ...]
    speedup: float
    flops_speedup: float
    psnr: float
    psnr_worst: float
    ssim: float
    accuracy: float
    reuse_ratio: float | None
    cache_bytes: int

    @property
    def median_seconds(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.seconds)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form; an infinite PSNR is written as null."""
        record = asdict(self) | {"median_seconds": self.median_seconds}
        return {name: _finite(value) for name, value in record.items()}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "VariantResult":
        """The variant that `as_dict` described."""
        known = {name: value for name, value in record.items() if name != "median_seconds"}
        for name in ("psnr", "psnr_worst"):
            known[name] = math.inf if known[name] is None else known[name]
        return cls(**known | {"seconds": tuple(known["seconds"])})


@dataclass(frozen=True)
class DemoResult:
    """All variants of one run, `original` first, with what is needed to repeat it."""

    settings: DemoSettings
    parameters: int
    variants: tuple[VariantResult, ...]

    @property
    def compiled(self) -> bool:
        """Whether our models ran through torch.compile."""
        return self.settings.compile and why_not_compiled(torch.device("cpu")) is None

    def __getitem__(self, name: str) -> VariantResult:
        return {variant.name: variant for variant in self.variants}[name]

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form with the versions that produced it; holds no host name and no path."""
        return {
            "settings": asdict(self.settings),
            "model": {"name": "digits", "parameters": self.parameters},
            **provenance(compiled=self.compiled),
            "variants": [variant.as_dict() for variant in self.variants],
        }


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
