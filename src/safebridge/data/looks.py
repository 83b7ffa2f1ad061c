"""Other looks of the same pictures, so that a fit learns what they show and not how."""

import random
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Final

from PIL import Image, ImageEnhance, ImageOps

from safebridge.data.sample import Sample, open_images
from safebridge.errors import DataError

__all__ = ["draw_look", "draw_looks"]

_TURN: Final = 20
"""Largest turn in degrees."""
_SMALLEST: Final = 0.6
"""Smallest size, as a share of the picture's."""
_COLOUR: Final = 0.6
_BRIGHTNESS: Final = 0.25
_CONTRAST: Final = 0.35
_HUE: Final = 30
"""Largest shift of the hue, of 256."""
_QUALITY: Final = 88


def draw_looks(samples: Iterable[Sample], folder: Path, *, seed: int = 0) -> list[Sample]:
    """Give each sample pictures of its own, each another look of what it had.

    Where a few pictures stand in many samples, a fit would learn those pictures; with looks it
    sees each of them once only.

    Args:
        samples: Samples with or without pictures; not changed.
        folder: Where the pictures are written, as JPEG; made if it is not there.
        seed: Seed of the looks; a look depends on it and on the sample's id alone.

    Raises:
        DataError: If a picture cannot be read, or the folder cannot be written.
    """
    found = []
    for number, sample in enumerate(samples):
        paths = []
        for index, image in enumerate(open_images(sample)):
            path = folder / f"{number:06d}-{index}.jpg"
            look = draw_look(image, random.Random(f"{seed}/{sample.id}/{index}"))
            try:
                folder.mkdir(parents=True, exist_ok=True)
                look.save(path, "JPEG", quality=_QUALITY)
            except OSError as error:
                raise DataError(
                    f"cannot write the picture {path}: {error}. Name a folder with room."
                ) from error
            paths.append(path)
        found.append(replace(sample, images=tuple(paths)))
    return found


def draw_look(image: Image.Image, rng: random.Random) -> Image.Image:
    """Return a picture mirrored, turned, shrunk, moved and recoloured by chance.

    Args:
        image: An RGB picture.
        rng: Where chance comes from.

    Returns:
        An RGB picture of the same size; what is uncovered takes the colour of the corner.
    """
    paper = image.getpixel((0, 0))
    if rng.random() < 0.5:  # noqa: PLR2004 - half of them
        image = ImageOps.mirror(image)
    image = image.rotate(rng.uniform(-_TURN, _TURN), Image.Resampling.BICUBIC, fillcolor=paper)
    for enhancer, spread in (
        (ImageEnhance.Color, _COLOUR),
        (ImageEnhance.Brightness, _BRIGHTNESS),
        (ImageEnhance.Contrast, _CONTRAST),
    ):
        image = enhancer(image).enhance(rng.uniform(1 - spread, 1 + spread))
    image = _shift_hue(image, rng.randint(-_HUE, _HUE))
    width, height = image.size
    scale = rng.uniform(_SMALLEST, 1)
    small = image.resize((max(1, round(width * scale)), max(1, round(height * scale))))
    canvas = Image.new("RGB", (width, height), image.getpixel((0, 0)))
    place = (rng.randint(0, width - small.width), rng.randint(0, height - small.height))
    canvas.paste(small, place)
    return canvas


def _shift_hue(image: Image.Image, shift: int) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    moved = hue.point([(level + shift) % 256 for level in range(256)])
    return Image.merge("HSV", (moved, saturation, value)).convert("RGB")
