"""Pictures of samples: a plain grid, and the demo's comparison with what changed made visible."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moeca_fx.errors import InputError, require

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

PAPER, INK, MUTED, TILE = (255, 255, 255), (28, 30, 33), (110, 115, 122), (242, 243, 245)
DIFFERENCE = (196, 48, 43)  # what full difference looks like; no difference is TILE
GAIN = 10.0
"""Factor on the absolute difference before it is drawn: 0.2 of the range of 2 is full colour."""


@dataclass(frozen=True)
class Panel:
    """One variant of the comparison: its name, one line of numbers, its images [B, 1, H, W]."""

    title: str
    caption: str
    images: Tensor


def sample_grid(images: Tensor, columns: int, zoom: int, gap: int = 4) -> "Image":
    """Images side by side on paper.

    Args:
        images: [B, C, H, W]. One channel in [-1, 1] is drawn as ink on paper; of more, the first three are
            drawn as red, green and blue, each image stretched to its own range (latents have no natural one).
        columns: images in a row.
        zoom: screen pixels a side of an image's pixel.
        gap: pixels of paper between images.

    Raises:
        InputError: `images` is not [B, C, H, W] with at least one image and one channel.
        MissingExtraError: Pillow is not installed.
    """
    if images.ndim != 4 or images.shape[0] < 1 or images.shape[1] < 1:
        raise InputError(f"sample_grid: expected images [B, C, H, W], found {list(images.shape)}")
    if images.shape[1] == 1:
        colours = _between(TILE, INK, (images[:, 0] + 1) / 2)
    else:
        colours = _stretch(images)
    return _grid(colours, columns, zoom, gap)


def comparison(panels: Sequence[Panel], columns: int, zoom: int, footer: str) -> "Image":
    """The variants beside each other, the reference first; below the others, their difference times `GAIN`.

    Raises:
        InputError: no panels, or panels whose images differ in shape.
        MissingExtraError: Pillow is not installed.
    """
    if not panels or any(panel.images.shape != panels[0].images.shape for panel in panels):
        raise InputError(f"comparison: expected panels of one shape, found {[list(p.images.shape) for p in panels]}")
    require("PIL", "demo")
    from PIL import Image, ImageDraw

    reference = panels[0].images
    grids = [sample_grid(panel.images, columns, zoom) for panel in panels]
    changes = [_difference_grid(panel.images, reference, columns, zoom) for panel in panels]
    width, height = grids[0].size
    margin, head, between = 36, 66, 44
    canvas = Image.new(
        "RGB",
        (margin + len(panels) * (width + margin), margin + head + 2 * height + between + 60),
        PAPER,
    )
    draw = ImageDraw.Draw(canvas)
    for position, panel in enumerate(panels):
        left, top = margin + position * (width + margin), margin
        _text(draw, left, top - 4, panel.title, 24, INK)
        _text(draw, left, top + 30, panel.caption, 16, MUTED)
        canvas.paste(grids[position], (left, top + head))
        below = top + head + height
        if position > 0:
            _text(draw, left, below + 14, f"absolute difference x {GAIN:.0f}", 16, MUTED)
            canvas.paste(changes[position], (left, below + between))
    notes = top + head + height + between  # the reference has no difference: its lower field holds the notes
    draw.multiline_text((margin, notes), footer, fill=MUTED, font=_font(16), spacing=8)
    return canvas


def _difference_grid(images: Tensor, reference: Tensor, columns: int, zoom: int) -> "Image":
    change = (images - reference).abs().mean(dim=1) / 2 * GAIN
    return _grid(_between(TILE, DIFFERENCE, change), columns, zoom, gap=4)


def _grid(colours: Tensor, columns: int, zoom: int, gap: int) -> "Image":
    """Paste [B, H, W, 3] uint8 tiles row by row."""
    require("PIL", "demo")
    from PIL import Image

    count, height, width = colours.shape[:3]
    columns = min(columns, count)
    rows = -(-count // columns)
    canvas = Image.new("RGB", (columns * (width * zoom + gap) - gap, rows * (height * zoom + gap) - gap), PAPER)
    for number, tile in enumerate(colours):
        picture = Image.frombytes("RGB", (width, height), bytes(tile.contiguous().view(-1).tolist()))
        picture = picture.resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
        canvas.paste(picture, (number % columns * (width * zoom + gap), number // columns * (height * zoom + gap)))
    return canvas


def _between(low: tuple[int, int, int], high: tuple[int, int, int], amount: Tensor) -> Tensor:
    """Blend two colours: amount [B, H, W], clamped to [0, 1] -> [B, H, W, 3] uint8."""
    start, end = torch.tensor(low, dtype=torch.float32), torch.tensor(high, dtype=torch.float32)
    blend = start + amount.float().clamp(0, 1).unsqueeze(-1) * (end - start)
    return blend.round().to(torch.uint8)


def _stretch(images: Tensor) -> Tensor:
    """First three channels of [B, C, H, W] stretched to each image's range -> [B, H, W, 3] uint8."""
    first = images[:, [0, 1, min(2, images.shape[1] - 1)]].float()
    low, high = first.amin(dim=(1, 2, 3), keepdim=True), first.amax(dim=(1, 2, 3), keepdim=True)
    scaled = (first - low) / (high - low).clamp_min(1e-12)
    return (scaled * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def _font(size: int):  # type: ignore[no-untyped-def]  # Pillow's font classes differ with its build
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _text(draw: "ImageDraw", left: int, top: int, text: str, size: int, colour: tuple[int, int, int]) -> None:
    draw.text((left, top), text, fill=colour, font=_font(size))
