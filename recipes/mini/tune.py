"""The recipe's training step: answer tokens only, length-bucketed batches, resumable."""

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Sample = TypeVar("Sample")
CHECKPOINT_EVERY = 25


def bucketed(
    samples: Sequence[Sample], length: Callable[[Sample], int], size: int, seed: int
) -> list[list[Sample]]:
    """Return shuffled batches whose samples have about the same length."""
    rng = random.Random(seed)
    order = list(samples)
    rng.shuffle(order)
    batches = []
    for start in range(0, len(order), size * 24):
        chunk = sorted(order[start : start + size * 24], key=length)
        batches += [chunk[i : i + size] for i in range(0, len(chunk), size)]
    rng.shuffle(batches)
    return batches


def answer_loss(decoder: nn.Module, lm_head: nn.Module, labels: Tensor, **inputs: Tensor) -> Tensor:
    """Return the mean cross-entropy at the labelled positions; other logits are not computed."""
    hidden = decoder(**inputs, use_cache=False).last_hidden_state[:, :-1]
    wanted = labels[:, 1:]
    mask = wanted != -100
    return nn.functional.cross_entropy(lm_head(hidden[mask]).float(), wanted[mask])


def tune(
    parameters: dict[str, nn.Parameter],
    batches: Callable[[int], Iterator],
    loss_of: Callable[[object], Tensor],
    *,
    steps: int,
    lr: float,
    folder: Path,
    name: str,
) -> None:
    """Train `parameters` for `steps` steps with AdamW and a cosine schedule, resumably.

    Args:
        parameters: Trainable parameters by name.
        batches: Gives the batches of one epoch.
        loss_of: The loss of one batch.
        steps: Optimiser steps in all.
        lr: Peak learning rate.
        folder: Where `<name>.safetensors` and the optimiser's state are written.
        name: Name of the stage.
    """
    weights_path, state_path = folder / f"{name}.safetensors", folder / f"{name}.state"
    optimizer = torch.optim.AdamW(parameters.values(), lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    warmup = max(steps // 20, 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / warmup, 0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2
        ),
    )
    step = 0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        step = state["step"]
        saved = load_file(weights_path)
        with torch.no_grad():
            for key, value in parameters.items():
                value.copy_(saved[key])
    started, recent, epoch, seen = time.time(), [], 0, 0
    while step < steps:
        for batch in batches(epoch):
            seen += 1
            if seen <= step:
                continue
            loss = loss_of(batch)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            step += 1
            recent.append(loss.item())
            if step % 10 == 0:
                mean = sum(recent[-20:]) / len(recent[-20:])
                seconds = (time.time() - started) / len(recent)
                print(f"{name} {step}/{steps} loss {mean:.3f} {seconds:.2f} s/step", flush=True)
            if step % CHECKPOINT_EVERY == 0 or step >= steps:
                save_file({k: v.detach().contiguous() for k, v in parameters.items()}, weights_path)
                torch.save(
                    {
                        "optimizer": optimizer.state_dict(),
                        "schedule": schedule.state_dict(),
                        "step": step,
                    },
                    state_path,
                )
            if step >= steps:
                break
        epoch += 1
