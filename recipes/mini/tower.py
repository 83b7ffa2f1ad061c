"""Stage `tower`: the tower's late blocks learn the drawings' names, in many looks.

The published network knows photographs. Its early blocks stay as they are; the late blocks and
the head are trained to name the drawings of the fit styles, with the statistics of the features
mixed between drawings (Zhou et al. 2021, "MixStyle"), so that a style tells nothing.
"""

import math
from pathlib import Path

import numpy as np
import torch
from features import places
from pictures import Drawing
from safetensors.torch import save_file
from torch import Tensor, nn

from safebridge.models.lite0 import EARLY_BLOCKS, Lite0VisionModel

LEFT_OUT = ("emojione", "emojione-monotone")
"""Styles of the fit split that tower and projector are not trained on: what comes after them, the
language model's adapter and (of the first style, which ships) every defense, then also learns from
pictures as hard to read as those of a held-out style."""
BATCH = 128
LR, HEAD_LR = 4e-4, 2e-3
MIX_SHARE, MIX_CONCENTRATION = 0.5, 0.2
DROPOUT, SMOOTHING = 0.3, 0.1
REPORT_EVERY = 50


def is_trained_on(drawing: Drawing) -> bool:
    """Return whether tower and projector learn from a drawing."""
    return drawing.split == "fit" and drawing.style not in LEFT_OUT


def late_parameters(tower: Lite0VisionModel) -> dict[str, nn.Parameter]:
    """Return the parameters after the early blocks, by name."""
    early = tuple(f"blocks.{number}." for number in range(EARLY_BLOCKS))
    return {
        key: value
        for key, value in tower.named_parameters()
        if not key.startswith(("stem.", *early))
    }


def mix_styles(hidden: Tensor, generator: torch.Generator) -> Tensor:
    """Mix each picture's channel means and deviations with another's, for about half of them.

    Args:
        hidden: Features, "batch channels rows columns".
        generator: Source of the choices.

    Source:
        Zhou et al. 2021, "Domain Generalization with MixStyle", equations 4 to 6.
    """
    mean = hidden.mean((2, 3), keepdim=True)
    deviation = hidden.std((2, 3), keepdim=True) + 1e-5
    other = torch.randperm(len(hidden), generator=generator)
    numpy_generator = np.random.default_rng(torch.randint(2**31, (), generator=generator).item())
    share = numpy_generator.beta(MIX_CONCENTRATION, MIX_CONCENTRATION, len(hidden))
    share[numpy_generator.random(len(hidden)) > MIX_SHARE] = 1.0
    kept = torch.from_numpy(share).to(hidden.dtype)[:, None, None, None]
    mixed_mean = kept * mean + (1 - kept) * mean[other]
    mixed_deviation = kept * deviation + (1 - kept) * deviation[other]
    return (hidden - mean) / deviation * mixed_deviation + mixed_mean


def train_tower(
    tower: Lite0VisionModel, drawings: list[Drawing], folder: Path, *, steps: int, seed: int
) -> None:
    """Train the late blocks in place and write them to `tower.safetensors`.

    Args:
        tower: The published tower in float32; batch statistics stay as published.
        drawings: All drawings, in the order of `early.npy`.
        folder: Holds `early.npy`.
        steps: Optimiser steps.
        seed: Seed of the batches.
    """
    early = np.load(folder / "early.npy", mmap_mode="r")
    names = sorted({drawing.concept for drawing in drawings})
    listed = places(drawings)
    labels = np.array([names.index(drawings[number].concept) for number, _ in listed])
    splits = np.array([drawings[number].split for number, _ in listed])
    fit = np.flatnonzero([is_trained_on(drawings[number]) for number, _ in listed])
    trained = late_parameters(tower)
    for value in tower.parameters():
        value.requires_grad_(False)  # noqa: FBT003 - torch's signature
    for value in trained.values():
        value.requires_grad_(True)  # noqa: FBT003 - torch's signature
    classifier = nn.Linear(tower.config.hidden_size, len(names))
    optimizer = torch.optim.AdamW(
        [
            {"params": list(trained.values()), "lr": LR},
            {"params": classifier.parameters(), "lr": HEAD_LR},
        ],
        weight_decay=0.05,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / 50, 0.02 + (1 + math.cos(math.pi * step / steps)) / 2),
    )
    generator = torch.Generator().manual_seed(seed)
    order = np.empty(0, dtype=np.int64)
    for step in range(steps):
        if len(order) < BATCH:
            order = np.concatenate([order, fit[torch.randperm(len(fit), generator=generator)]])
        rows, order = np.sort(order[:BATCH]), order[BATCH:]
        hidden = torch.from_numpy(early[rows].astype(np.float32))
        hidden = mix_styles(hidden, generator).to(memory_format=torch.channels_last)
        pooled = tower.forward_late(hidden).pooler_output
        logits = classifier(nn.functional.dropout(pooled, DROPOUT))
        loss = nn.functional.cross_entropy(
            logits, torch.from_numpy(labels[rows]), label_smoothing=SMOOTHING
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % REPORT_EVERY == REPORT_EVERY - 1 or step == steps - 1:
            held_out = np.flatnonzero(splits == "validation")
            found = _accuracy(tower, classifier, early[held_out], labels[held_out])
            print(
                f"tower {step + 1}/{steps} loss {loss.item():.3f} validation {found:.3f}",
                flush=True,
            )
    save_file(
        {k: v.detach().contiguous() for k, v in trained.items()}, folder / "tower.safetensors"
    )


@torch.inference_mode()
def _accuracy(tower: Lite0VisionModel, classifier: nn.Module, early, labels) -> float:
    pooled = tower.forward_late(torch.from_numpy(early.astype(np.float32))).pooler_output
    return float((classifier(pooled).argmax(-1).numpy() == labels).mean())
