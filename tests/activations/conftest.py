from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from safebridge.data.sample import Sample, open_images
from safebridge.models.load import VLM
from safebridge.models.tokens import encode
from safebridge.testing.tiny import tiny_vlm


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    paths = [folder / f"{number}.png" for number in range(3)]
    for path in paths:
        Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
    return paths


@pytest.fixture(scope="session")
def samples(pictures: list[Path]) -> list[Sample]:
    """Prompts and answers of different lengths, so that batches are padded."""
    return [
        Sample(
            id=f"s{number}",
            prompt="How?" + "!" * (2 * number),
            images=(pictures[number % 3],),
            answer="No" + "o" * (5 - number) + ".",
        )
        for number in range(5)
    ]


@pytest.fixture(scope="session")
def tiny() -> Callable[[str], VLM]:
    return cache(tiny_vlm)


@pytest.fixture(scope="session")
def inputs_of() -> Callable[..., dict[str, Any]]:
    def inputs(vlm: VLM, samples: Sequence[Sample], side: Any = "left") -> dict[str, Any]:
        return encode(
            vlm, [s.prompt for s in samples], [open_images(s) for s in samples], padding_side=side
        ).inputs

    return inputs


@pytest.fixture(scope="session")
def continued() -> Callable[[VLM, dict[str, Any], Tensor], dict[str, Any]]:
    """Return inputs with generated tokens as part of the prompt."""

    def extend(vlm: VLM, inputs: dict[str, Any], sequences: Tensor) -> dict[str, Any]:
        width = inputs["input_ids"].shape[1]
        new = sequences[:, width:]
        longer = dict(inputs, input_ids=sequences)
        is_suffix = int(vlm.layout.family == "paligemma")
        fills = {"attention_mask": 1, "token_type_ids": is_suffix, "mm_token_type_ids": 0}
        for name, fill in fills.items():
            if name in inputs:
                longer[name] = torch.cat([inputs[name], torch.full_like(new, fill)], dim=1)
        if "cross_attention_mask" in inputs:
            mask = inputs["cross_attention_mask"]
            last = mask[:, -1:].expand(-1, new.shape[1], -1, -1)
            longer["cross_attention_mask"] = torch.cat([mask, last], dim=1)
        return longer

    return extend
