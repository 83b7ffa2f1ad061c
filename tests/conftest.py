"""What every test needs: no network, one thread, and pictures made on the spot."""

import os
from collections.abc import Callable

# Set before anything imports torch or reaches for the hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def make_picture() -> Callable[..., Image.Image]:
    """Return a function that makes one picture of noise for each seed."""

    def make(seed: int = 0, size: tuple[int, int] = (50, 40), mode: str = "RGB") -> Image.Image:
        width, height = size
        noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        return Image.fromarray(noise).convert(mode)

    return make
