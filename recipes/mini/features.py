"""Stage `features`: the frozen tower's tokens of every drawing, plain and augmented, on disk."""

from pathlib import Path

import numpy as np
import torch
from pictures import Drawing, IconSet, picture
from PIL import Image

from safebridge.models.lite0 import GRID_TOKENS, Lite0VisionModel

BATCH = 32
VARIANTS = 6


def pixel_values(images: list[Image.Image]) -> torch.Tensor:
    """Return pictures as the tower wants them; equal to the saved image processor at 224 px."""
    array = np.stack([np.asarray(image, dtype=np.float32) for image in images])
    return torch.from_numpy(array).permute(0, 3, 1, 2) / 127.5 - 1.0


def build_features(
    tower: Lite0VisionModel, drawings: list[Drawing], sets: dict[str, IconSet], folder: Path
) -> np.ndarray:
    """Return tokens "drawings variants tokens hidden" as float16, continuing a part-way file.

    Only drawings of the fit split are augmented; the others repeat their plain variant.
    """
    width = tower.config.hidden_size
    shape = (len(drawings), VARIANTS, GRID_TOKENS, width)
    path, done_path = folder / "features.npy", folder / "features.done"
    mode = "r+" if path.exists() else "w+"
    tokens = np.lib.format.open_memmap(path, mode=mode, dtype=np.float16, shape=shape)
    start = int(done_path.read_text()) if done_path.exists() else 0
    tower = tower.to(torch.bfloat16, memory_format=torch.channels_last).eval()
    for first in range(start, len(drawings), BATCH):
        batch = drawings[first : first + BATCH]
        for variant in range(VARIANTS):
            todo = [d for d in batch if variant == 0 or d.split == "fit"]
            if not todo:
                tokens[first : first + len(batch), variant] = tokens[first : first + len(batch), 0]
                continue
            pixels = pixel_values([picture(d, sets, variant) for d in todo]).to(
                torch.bfloat16, memory_format=torch.channels_last
            )
            with torch.inference_mode():
                out = tower(pixels).last_hidden_state.float().numpy().astype(np.float16)
            rows = [first + i for i, d in enumerate(batch) if variant == 0 or d.split == "fit"]
            tokens[rows, variant] = out
        done_path.write_text(str(first + len(batch)))
        print(f"features {first + len(batch)}/{len(drawings)}", flush=True)
    tokens.flush()
    return tokens
