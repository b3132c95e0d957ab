"""Glyphs as tensors: 62 characters in the 21 text faces that matplotlib brings along, slightly moved and turned.

Nothing is downloaded: every image is rendered here, from a seed, so any machine with the same matplotlib and Pillow
draws the same set.
"""

import random
import string
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeca_fx.errors import require

IMAGE_SIZE = 32
CLASSES = string.digits + string.ascii_uppercase + string.ascii_lowercase
GREY_LEVELS = 256

LOOK_ALIKES = ("0Oo", "1Il", "Cc", "Ss", "Uu", "Vv", "Ww", "Xx", "Zz")
"""Characters whose shapes differ in size alone, or in some faces not at all."""

LEARN_VARIANTS = 16
HELD_OUT_VARIANTS = 4
SEED = 20260920

FACES = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *("cmb10", "cmr10", "cmss10", "cmti10", "cmtt10"),
)

# One variant: font size in pixels, turn in degrees, shift of the baseline's middle in pixels.
SIZES = (22, 27)
TURN = 8.0
SHIFT = 2.0
BASELINE = (IMAGE_SIZE / 2, 25.0)


def _faces() -> dict[tuple[str, int], Any]:
    require("matplotlib", "zoo-data")
    require("PIL.ImageFont", "zoo-data")
    import matplotlib
    from PIL import ImageFont

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    sizes = range(SIZES[0], SIZES[1] + 1)
    return {(face, size): ImageFont.truetype(str(folder / f"{face}.ttf"), size) for face in FACES for size in sizes}


def _render(character: str, font: Any, draw_from: random.Random) -> Any:
    from PIL import Image, ImageDraw

    image = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE))
    x, y = (middle + draw_from.uniform(-SHIFT, SHIFT) for middle in BASELINE)
    ImageDraw.Draw(image).text((x, y), character, font=font, fill=GREY_LEVELS - 1, anchor="ms")
    return image.rotate(draw_from.uniform(-TURN, TURN), resample=Image.Resampling.BICUBIC)


def render(variants: int, seed: int) -> tuple[Tensor, Tensor]:
    """Render every character in every face.

    Args:
        variants: images of each (face, character).
        seed: of sizes, turns and shifts.

    Returns:
        images [N, 1, 32, 32] in [-1, 1] (white on black) and labels [N] int64, indices into `CLASSES`; N is
        62 characters x 21 faces x `variants`.

    Raises:
        MissingExtraError: matplotlib or Pillow is not installed.
    """
    fonts, draw_from = _faces(), random.Random(seed)
    pixels, labels = bytearray(), []
    for label, character in enumerate(CLASSES):
        for face in FACES:
            for _ in range(variants):
                font = fonts[face, draw_from.randint(*SIZES)]
                pixels += _render(character, font, draw_from).tobytes()
                labels.append(label)
    images = torch.frombuffer(pixels, dtype=torch.uint8).view(-1, 1, IMAGE_SIZE, IMAGE_SIZE)
    return images.float() / ((GREY_LEVELS - 1) / 2) - 1, torch.tensor(labels)


@lru_cache(maxsize=1)
def load_split() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The glyphs.

    Returns:
        (images, labels) to learn from and (images, labels) held out: the same faces, other sizes, turns and shifts.
        Images [N, 1, 32, 32] in [-1, 1], labels [N] int64.

    Raises:
        MissingExtraError: matplotlib or Pillow is not installed.
    """
    return render(LEARN_VARIANTS, SEED), render(HELD_OUT_VARIANTS, SEED + 1)
