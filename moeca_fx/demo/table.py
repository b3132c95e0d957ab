"""The demo's table as text, shared by the terminal and the README."""

import math

from moeca_fx.demo.result import VariantResult

HEADINGS = (
    "model",
    "seconds",
    "speed-up",
    "FLOPs speed-up",
    "PSNR dB",
    "SSIM",
    "class accuracy",
    "reuse",
    "cache MB",
)


def table_cells(variant: VariantResult) -> tuple[str, ...]:
    """The row of one variant, a cell for each of `HEADINGS`; ``-`` where a number would say nothing."""
    reference, cached = variant.name == "original", variant.reuse_ratio is not None
    return (
        variant.name,
        f"{variant.median_seconds:.2f}",
        f"{variant.speedup:.2f}",
        f"{variant.flops_speedup:.2f}",
        "-" if reference else "equal" if math.isinf(variant.psnr) else f"{variant.psnr:.1f}",
        "-" if reference else f"{variant.ssim:.4f}",
        f"{100 * variant.accuracy:.1f} %",
        f"{100 * variant.reuse_ratio:.1f} %" if variant.reuse_ratio is not None else "-",
        f"{variant.cache_bytes / 1e6:.1f}" if cached else "-",
    )
