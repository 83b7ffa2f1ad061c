from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from PIL import Image

from safebridge.data.sample import Sample
from safebridge.models.load import VLM
from safebridge.testing.tiny import tiny_vlm


@pytest.fixture(scope="session")
def tiny() -> Callable[[str], VLM]:
    return cache(tiny_vlm)


@pytest.fixture(scope="session")
def shown(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Four requests with pictures and captions."""
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    samples = []
    for number in range(4):
        path = folder / f"{number}.png"
        Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
        samples.append(Sample(str(number), "How?", (path,), caption=f"thing number {number}"))
    return samples
