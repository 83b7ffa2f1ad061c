"""Stages `drawings` and `tokens`: what the tower makes of every drawing, kept on disk."""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from pictures import Drawing, load_icon_sets, picture
from PIL import Image
from torch import Tensor

from safebridge.models.lite0 import GRID_TOKENS, Lite0VisionModel

BATCH = 64
VARIANTS = 8
EARLY_SHAPE = (112, 14, 14)

Place = tuple[int, int]
"""Number of a drawing and of its variant."""


def pixel_values(images: list[Image.Image]) -> torch.Tensor:
    """Return pictures as the tower wants them; equal to the saved image processor at 224 px."""
    array = np.stack([np.asarray(image, dtype=np.float32) for image in images])
    return torch.from_numpy(array).permute(0, 3, 1, 2) / 127.5 - 1.0


def places(drawings: list[Drawing]) -> list[Place]:
    """Return every drawing's plain variant and, of the fit split, the augmented ones."""
    return [
        (number, variant)
        for number, drawing in enumerate(drawings)
        for variant in range(VARIANTS if drawing.split == "fit" else 1)
    ]


@torch.inference_mode()
def build_early(
    tower: Lite0VisionModel, drawings: list[Drawing], node_modules: Path, folder: Path
) -> None:
    """Write `early.npy`, "places channels rows columns" in float16; continues a part-way file."""
    listed = places(drawings)
    path, done_path = folder / "early.npy", folder / "early.done"
    mode = "r+" if path.exists() else "w+"
    shape = (len(listed), *EARLY_SHAPE)
    kept = np.lib.format.open_memmap(path, mode=mode, dtype=np.float16, shape=shape)
    start = int(done_path.read_text()) if done_path.exists() else 0
    tower = tower.to(torch.bfloat16, memory_format=torch.channels_last).eval()
    for pixels in draw_batches(drawings, listed[start:], node_modules):
        wanted = pixels.to(torch.bfloat16, memory_format=torch.channels_last)
        end = start + len(pixels)
        kept[start:end] = tower.forward_early(wanted).float().numpy().astype(np.float16)
        start = end
        done_path.write_text(str(end))
        print(f"early {end}/{len(listed)}", flush=True)
    kept.flush()


@torch.inference_mode()
def build_tokens(tower: Lite0VisionModel, folder: Path) -> None:
    """Write `tokens.npy`, "places tokens hidden" in float16, from `early.npy`."""
    early = np.load(folder / "early.npy", mmap_mode="r")
    shape = (len(early), GRID_TOKENS, tower.config.hidden_size)
    path = folder / "tokens.npy"
    kept = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
    tower = tower.to(torch.bfloat16).eval()
    for start in range(0, len(early), BATCH):
        hidden = torch.from_numpy(early[start : start + BATCH]).to(torch.bfloat16)
        out: Tensor = tower.forward_late(hidden).last_hidden_state
        kept[start : start + BATCH] = out.float().numpy().astype(np.float16)
    kept.flush()


def draw_batches(
    drawings: list[Drawing], listed: list[Place], node_modules: Path
) -> Iterator[torch.Tensor]:
    """Yield the pictures in batches, drawn ahead by two processes."""
    parts = [
        [(drawings[number], variant) for number, variant in listed[start : start + BATCH]]
        for start in range(0, len(listed), BATCH)
    ]
    with ProcessPoolExecutor(2) as pool:
        for images in pool.map(_draw, parts, repeat(node_modules)):
            yield pixel_values(images)


def _draw(wanted: list[tuple[Drawing, int]], node_modules: Path) -> list[Image.Image]:
    return [picture(drawing, _sets(node_modules), variant) for drawing, variant in wanted]


@cache
def _sets(node_modules: Path):  # noqa: ANN202 - a cache of `load_icon_sets`
    return load_icon_sets(node_modules)
