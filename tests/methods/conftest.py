from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from safebridge.data.sample import Sample
from safebridge.models.load import VLM
from safebridge.testing.tiny import tiny_vlm

ANSWERS = {"SA": "I cannot.", "TCB": "Take a cup.", "GB": "A red one."}


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    paths = [folder / f"{number}.png" for number in range(4)]
    for path in paths:
        Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
    return paths


@pytest.fixture(scope="session")
def triad(pictures: list[Path]) -> list[Sample]:
    names = ["SA", "TCB", "GB"]
    return [
        Sample(
            id=str(number),
            prompt="How?" + "!" * (number % 4),
            images=(pictures[number % 4],),
            answer=ANSWERS[names[number % 3]],
            set_name=names[number % 3],
        )
        for number in range(6)
    ]


@pytest.fixture(scope="session")
def tiny() -> Callable[[str], VLM]:
    return cache(tiny_vlm)
