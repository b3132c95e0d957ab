"""How far cached images are from the uncached run's: PSNR and SSIM, thin wrappers over torchmetrics.

Both compare raw floating-point images (nothing is clamped or rounded first), so a value outside the data
range counts as the error it is. torchmetrics comes with the extra ``demo``.
"""

import torch
from torch import Tensor

from moeca_fx.errors import InputError, require

IMAGE_RANGE = 2.0
"""Width of the value range of images in [-1, 1]."""

SSIM_WINDOW = 7
"""Side of the uniform SSIM window: the largest odd one that fits an 8x8 image."""


def psnr(images: Tensor, reference: Tensor, data_range: float = IMAGE_RANGE) -> float:
    """Peak signal-to-noise ratio in dB over all values of the batch together.

    The squared error is averaged over the whole batch before the logarithm, so one bad image weighs more than
    it would in a mean of per-image values. Infinite when the images are equal.

    Args:
        images: the images to judge, [B, C, H, W].
        reference: the images they should be, [B, C, H, W].
        data_range: width of the value range, 2.0 for images in [-1, 1].

    Raises:
        InputError: shapes differ, a value is not finite, or `data_range` is not positive.
        MissingExtraError: torchmetrics is not installed.
    """
    _check("psnr", images, reference, data_range)
    require("torchmetrics", "demo")
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return float(peak_signal_noise_ratio(images.float(), reference.float(), data_range=data_range))


def psnr_per_image(images: Tensor, reference: Tensor, data_range: float = IMAGE_RANGE) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image, [B]; arguments and errors as in `psnr`."""
    _check("psnr_per_image", images, reference, data_range)
    require("torchmetrics", "demo")
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return peak_signal_noise_ratio(
        images.float(), reference.float(), data_range=data_range, dim=(1, 2, 3), reduction="none"
    )


def ssim(images: Tensor, reference: Tensor, data_range: float = IMAGE_RANGE, window: int = SSIM_WINDOW) -> float:
    """Structural similarity (Wang et al. 2004, k1 .01, k2 .03) with a uniform window, mean over the batch.

    The usual Gaussian window of 11 pixels does not fit an 8x8 image; the uniform one of 7 does.

    Args:
        images: the images to judge, [B, C, H, W].
        reference: the images they should be, [B, C, H, W].
        data_range: width of the value range, 2.0 for images in [-1, 1].
        window: side of the window in pixels, odd, at most the shorter image side.

    Raises:
        InputError: shapes differ, a value is not finite, or `window` is even, not positive or too large.
        MissingExtraError: torchmetrics is not installed.
    """
    _check("ssim", images, reference, data_range)
    shorter = min(images.shape[-2:])
    if window < 1 or window % 2 == 0 or window > shorter:
        raise InputError(
            f"ssim: expected an odd window between 1 and the shorter image side {shorter}, found {window}; "
            "choose a smaller odd window"
        )
    require("torchmetrics", "demo")
    from torchmetrics.functional.image import structural_similarity_index_measure

    value = structural_similarity_index_measure(
        images.float(), reference.float(), data_range=data_range, gaussian_kernel=False, kernel_size=window
    )
    assert isinstance(value, Tensor)  # a tuple only when the full similarity image is asked for
    return float(value)


def _check(what: str, images: Tensor, reference: Tensor, data_range: float) -> None:
    if images.ndim != 4 or images.shape != reference.shape or 0 in images.shape:
        raise InputError(
            f"{what}: expected images and reference of one shape [B, C, H, W], found "
            f"{list(images.shape)} and {list(reference.shape)}; sample both from the same noise"
        )
    for name, tensor in (("images", images), ("reference", reference)):
        if not torch.isfinite(tensor).all():
            raise InputError(
                f"{what}: {name} holds values that are not finite; the run that made them diverged, "
                "check its inputs and weights"
            )
    if not data_range > 0:
        raise InputError(f"{what}: expected a positive data_range, found {data_range}")
