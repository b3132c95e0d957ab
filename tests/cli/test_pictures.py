"""Pictures and image metrics on values worked out by hand."""

import math

import pytest
import torch

from moeca_fx.demo.picture import DIFFERENCE, INK, PAPER, TILE, Panel, comparison, sample_grid
from moeca_fx.errors import InputError
from moeca_fx.evaluate import psnr, psnr_per_image, ssim


def test_ink_and_paper_are_where_the_values_are():
    images = torch.tensor([[[[-1.0, 1.0]]], [[[1.0, -3.0]]]])  # [2, 1, 1, 2]; -3 is clamped
    grid = sample_grid(images, columns=2, zoom=1, gap=1)
    assert grid.size == (5, 1)
    assert [grid.getpixel((column, 0)) for column in range(5)] == [TILE, INK, PAPER, INK, TILE]


def test_latents_are_stretched_per_image():
    latents = torch.zeros(1, 4, 1, 2)
    latents[0, 0, 0] = torch.tensor([-5.0, 5.0])
    grid = sample_grid(latents, columns=1, zoom=1)
    assert [grid.getpixel((column, 0)) for column in (0, 1)] == [(0, 128, 128), (255, 128, 128)]


def test_the_comparison_shows_the_difference_ten_times():
    reference = torch.zeros(2, 1, 8, 8)
    changed = reference + 0.2  # a tenth of the range of 2, ten times
    panels = [Panel("a", "", reference), Panel("b", "", reference), Panel("c", "", changed)]
    picture = comparison(panels, columns=2, zoom=4, footer="")
    colours = {colour for _, colour in picture.crop((picture.width * 2 // 3, 0, *picture.size)).getcolors(100_000)}
    assert DIFFERENCE in colours
    middle = picture.crop((picture.width // 3, 0, picture.width * 2 // 3, picture.height))
    assert DIFFERENCE not in {colour for _, colour in middle.getcolors(100_000)}


def test_panels_of_different_shapes_are_refused():
    with pytest.raises(InputError, match="one shape"):
        comparison([Panel("a", "", torch.zeros(1, 1, 8, 8)), Panel("b", "", torch.zeros(2, 1, 8, 8))], 1, 1, "")
    with pytest.raises(InputError, match=r"\[B, C, H, W\]"):
        sample_grid(torch.zeros(8, 8), 1, 1)


def test_psnr_by_hand():
    reference = torch.zeros(2, 1, 8, 8)
    images = torch.stack([reference[0] + 0.02, reference[1]])
    assert psnr_per_image(images, reference)[0].item() == pytest.approx(40.0, abs=1e-3)  # 20 log10(2 / .02)
    assert psnr(images, reference) == pytest.approx(40.0 + 10 * math.log10(2), abs=1e-3)  # half the squared error
    assert psnr(reference, reference) == math.inf


def test_ssim_is_one_for_equal_images_and_falls_with_noise():
    reference = torch.randn(4, 1, 8, 8).clamp(-1, 1)
    assert ssim(reference, reference) == pytest.approx(1.0)
    slightly, badly = (reference + scale * torch.randn(reference.shape) for scale in (0.05, 0.5))
    assert 1 > ssim(slightly, reference) > ssim(badly, reference)


def test_metrics_refuse_what_cannot_be_compared():
    good = torch.zeros(2, 1, 8, 8)
    for metric in (psnr, psnr_per_image, ssim):
        with pytest.raises(InputError, match="one shape"):
            metric(good, torch.zeros(3, 1, 8, 8))
        with pytest.raises(InputError, match="not finite"):
            metric(torch.full_like(good, math.nan), good)
        with pytest.raises(InputError, match="positive data_range"):
            metric(good, good, data_range=0.0)
    for window in (0, 4, 9):
        with pytest.raises(InputError, match="odd window"):
            ssim(good, good, window=window)
