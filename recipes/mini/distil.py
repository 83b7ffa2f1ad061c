"""Does a CLIP-architecture tower of this size name drawings as well as the trained EfficientNet?

    python recipes/mini/distil.py [--work recipes/mini/work] [--steps 3000]

Needs npm and the extra `recipes`, and the trained tower that ships. A small CLIP vision transformer
(224 px, patches of 32, the same 7x7 grid) learns that tower's tokens and the drawings' names on the
same augmented pictures. Then one linear classifier is fitted on each tower's picture vector, on the
fit styles, and names the validation style. The answer goes to `distil.json`; a run that was cut off
goes on. Standard towers need no code of ours to load, so an equal one would be taken.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import tune
from build import SEED, icons, load_drawings
from features import BATCH, draw_batches, places
from pictures import SIZE, Drawing, find_drawings, load_icon_sets, write_index
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from safebridge.evaluation.statistics import measure_rate
from safebridge.models import mini
from safebridge.models.lite0 import GRID_TOKENS, Lite0Config

HERE = Path(__file__).parent
PATCH = 32
STUDENT = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 10,
           "num_attention_heads": 4, "image_size": SIZE, "patch_size": PATCH}  # fmt: skip
STEP_BATCH, LR = 64, 1e-3
NAME_WEIGHT = 0.5
PROBE_VARIANTS = 3
"""Looks of each drawing that the classifiers are fitted on; all would take long and add little."""


class Student(nn.Module):
    """A CLIP vision transformer whose tokens are brought to the teacher's places and width."""

    def __init__(self, names: int) -> None:
        super().__init__()
        self.tower = CLIPVisionModel(CLIPVisionConfig(**STUDENT))
        width = Lite0Config().hidden_size
        self.to_teacher = nn.Linear(STUDENT["hidden_size"], width)
        self.classifier = nn.Linear(width, names)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return a global token and a 3x3 grid, as the teacher has them."""
        hidden = self.tower(pixels).last_hidden_state
        side = SIZE // PATCH
        grid = hidden[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        local = nn.functional.avg_pool2d(grid, kernel_size=3, stride=2).flatten(2).transpose(1, 2)
        tokens: Tensor = self.to_teacher(torch.cat([hidden[:, :1], local], dim=1))
        return tokens


def list_drawings(work: Path) -> list[Drawing]:
    """Return all drawings, installing the icon sets first if they are not there."""
    if not (work / "drawings.csv").exists():
        work.mkdir(parents=True, exist_ok=True)
        icons(work)
        write_index(find_drawings(load_icon_sets(work / "node_modules")), work / "drawings.csv")
    return load_drawings(work)


def draw_pixels(drawings: list[Drawing], work: Path) -> np.ndarray:
    """Return every look of every drawing as uint8, "places channels rows columns", from a file."""
    listed, path = places(drawings), work / "pixels.npy"
    shape = (len(listed), 3, SIZE, SIZE)
    if not path.exists():
        part = path.with_suffix(".part")
        kept = np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=shape)
        start = 0
        for pixels in draw_batches(drawings, listed, work / "node_modules"):
            kept[start : start + len(pixels)] = ((pixels + 1) * 127.5).round().byte().numpy()
            start += len(pixels)
        kept.flush()
        part.rename(path)
    found = np.load(path, mmap_mode="r")
    if found.shape != shape:
        raise SystemExit(f"{path} was drawn from other drawings. Remove it and run again.")
    return found


@torch.inference_mode()
def teach(pixels: np.ndarray, work: Path) -> np.ndarray:
    """Return the shipped tower's tokens, "places tokens hidden" in float16, from a file."""
    path = work / "teacher.npy"
    if not path.exists():
        tower = mini.load_tower(mini.trained_parts()["vision_tower"]).to(torch.bfloat16).eval()
        shape = (len(pixels), GRID_TOKENS, Lite0Config().hidden_size)
        part = path.with_suffix(".part")
        kept = np.lib.format.open_memmap(part, mode="w+", dtype=np.float16, shape=shape)
        for start in range(0, len(pixels), BATCH):
            wanted = scaled(pixels[start : start + BATCH]).to(torch.bfloat16)
            kept[start : start + BATCH] = tower(wanted).last_hidden_state.float().numpy()
        kept.flush()
        part.rename(path)
    return np.load(path, mmap_mode="r")


def scaled(pixels: np.ndarray) -> Tensor:
    """Return pictures as both towers want them."""
    return torch.from_numpy(pixels).float() / 127.5 - 1.0


def distil(
    pixels: np.ndarray,
    tokens: np.ndarray,
    labels: np.ndarray,
    *,
    fit: np.ndarray,
    steps: int,
    work: Path,
) -> Student:
    """Teach the student on the looks of the fit styles; goes on from a checkpoint."""
    torch.manual_seed(SEED)
    student = Student(int(labels.max()) + 1)
    few = np.asarray(tokens[fit[:2048]], dtype=np.float32)
    mean = torch.from_numpy(few.mean((0, 1)))
    spread = torch.from_numpy(few.std((0, 1))) + 1e-3

    def batches(epoch: int) -> Iterator[np.ndarray]:
        order = np.random.default_rng([SEED, epoch]).permutation(fit)
        for start in range(0, len(order) - STEP_BATCH + 1, STEP_BATCH):
            yield np.sort(order[start : start + STEP_BATCH])

    def loss_of(rows: np.ndarray) -> Tensor:
        wanted = (torch.from_numpy(tokens[rows]).float() - mean) / spread
        with torch.autocast("cpu", torch.bfloat16):
            found = student(scaled(pixels[rows]))
            logits = student.classifier(nn.functional.dropout(found[:, 0], 0.1))
        near = 1 - nn.functional.cosine_similarity(found.float(), wanted, dim=-1).mean()
        named = nn.functional.cross_entropy(
            logits.float(), torch.from_numpy(labels[rows]), label_smoothing=0.1
        )
        return near + NAME_WEIGHT * named

    parameters = dict(student.named_parameters())
    tune.tune(parameters, batches, loss_of, steps=steps, lr=LR, folder=work, name="student")
    return student.eval()


@torch.inference_mode()
def picture_vectors(student: Student, pixels: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the student's global token of some pictures, before it is brought to the teacher's."""
    found = []
    for start in range(0, len(rows), BATCH):
        part = scaled(pixels[rows[start : start + BATCH]])
        found.append(student.tower(part).pooler_output.numpy())
    return np.concatenate(found)


def top1(features: dict[str, np.ndarray], labels: dict[str, np.ndarray]) -> np.ndarray:
    """Return which validation pictures a linear classifier on the fit styles names."""
    scaler = StandardScaler().fit(features["fit"])
    model = LogisticRegression(C=0.01, max_iter=200)
    model.fit(scaler.transform(features["fit"]), labels["fit"])
    found: np.ndarray = model.predict(scaler.transform(features["validation"]))
    return found == labels["validation"]


def main() -> None:
    """Train, compare, and write the answer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=HERE / "work")
    parser.add_argument("--steps", type=int, default=3000)
    options = parser.parse_args()
    started = time.time()
    drawings = list_drawings(options.work)
    listed = places(drawings)
    names = sorted({drawing.concept for drawing in drawings})
    labels = np.array([names.index(drawings[number].concept) for number, _ in listed])
    splits = np.array([drawings[number].split for number, _ in listed])
    variants = np.array([variant for _, variant in listed])
    fit = np.flatnonzero(splits == "fit")
    pixels = draw_pixels(drawings, options.work)
    tokens = teach(pixels, options.work)
    student = distil(pixels, tokens, labels, fit=fit, steps=options.steps, work=options.work)
    rows = {
        "fit": np.flatnonzero((splits == "fit") & (variants < PROBE_VARIANTS)),
        "validation": np.flatnonzero(splits == "validation"),
    }
    own = {part: labels[where] for part, where in rows.items()}
    features = {
        "EfficientNet-Lite0, late blocks trained": {
            part: np.asarray(tokens[where, 0], dtype=np.float32) for part, where in rows.items()
        },
        "CLIP architecture, distilled": {
            part: picture_vectors(student, pixels, where) for part, where in rows.items()
        },
    }
    answer = {
        "question": "share of the validation style's drawings named by a linear classifier",
        "steps": options.steps,
        "batch_size": STEP_BATCH,
        "seed": SEED,
        "student": {**STUDENT, "parameters": sum(p.numel() for p in student.tower.parameters())},
        "tokens": GRID_TOKENS,
        "seconds": round(time.time() - started),
        "named": {
            tower: measure_rate(top1(found, own).tolist()).to_json()
            for tower, found in features.items()
        },
    }
    (HERE / "distil.json").write_text(json.dumps(answer, indent=1) + "\n")
    print(json.dumps(answer["named"], indent=1))


if __name__ == "__main__":
    main()
