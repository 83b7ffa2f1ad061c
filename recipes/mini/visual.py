"""Stages `warm` and `visual`: the projector and the visual-instruction adapter."""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from answers import turn
from contrast import cut
from features import VARIANTS
from pictures import Drawing
from text import END, TextSample, complete, load_answers
from torch import Tensor, nn
from tower import is_trained_on
from tune import answer_loss, bucketed

from safebridge.data.tables import load_concepts, load_requests, load_splits
from safebridge.models.mini import IMAGE_TOKEN

CAPTIONS = (
    "This is {}.",
    "The picture shows {}.",
    "This is a drawing of {}.",
    "It is {}.",
)
TEMPERATURE = 0.07
WARM_BATCH, WARM_LR, WARM_DROPOUT = 128, 2e-3, 0.5
NEAR_WEIGHT = 3.0
SHARPNESS = 1.75
TOKEN_DROPOUT = 0.15
UNKNOWN_TIMES = 3
"""How often an epoch has a drawing of a style that the tower was not trained on."""
TEXT_SHARE = 0.4
"""Share of text-only samples."""


@dataclass(frozen=True)
class Mix:
    """What an epoch has besides the captions."""

    questions: int
    """Questions about each harmless drawing."""

    refusals: float
    """Share of refusals among the texts; most are answered, so that a refusal needs more than a
    suspicious wording."""

    apart: float
    """Share of the text requests that name their object apart and point at it."""


INSTRUCT_MIX = Mix(questions=1, refusals=0.42, apart=0.6)
SETTLE_MIX = Mix(questions=2, refusals=0.33, apart=0.0)
"""At the end the texts are plain, as in real instruction data: nothing but the language model's own
text alignment says what to do with an object in the picture's place."""


@dataclass(frozen=True)
class VisualSample:
    """A prompt in chat format, the row of its picture's tokens (-1: none), and the answer."""

    prompt: str
    answer: str
    picture: int = -1


def instruction_rows(files: list[Path], tokenizer) -> dict[str, list[tuple[str, str]]]:
    """Return picture questions with the language model's own answers, by benign concept."""
    concepts = load_concepts()
    rows: dict[str, list[tuple[str, str]]] = {}
    for row in itertools.chain.from_iterable(map(load_answers, files)):
        concept = concepts.get(row["concept"])
        if concept and not concept.is_harmful and concept.icons:
            wording = row.get("wording")
            ask = wording.format("this") if wording else load_requests()[row["request"]].picture
            answer = cut(row["answer"] if wording else complete(row["answer"]), tokenizer, 12)
            rows.setdefault(concept.name, []).append((ask, answer))
    return rows


class VisualMixture:
    """Captions of all concepts, benign instructions, and text-only samples, epoch by epoch."""

    def __init__(
        self,
        drawings: list[Drawing],
        texts: list[TextSample],
        instructions: dict[str, list[tuple[str, str]]],
        mix: Mix,
    ) -> None:
        first = 0
        self.fit: list[tuple[int, Drawing]] = []
        for drawing in drawings:
            if drawing.split == "fit":
                # Reading what the tower was not trained on is what has to be learnt.
                self.fit += [(first, drawing)] * (1 if is_trained_on(drawing) else UNKNOWN_TIMES)
            first += VARIANTS if drawing.split == "fit" else 1
        self.refusals = [sample for sample in texts if sample.kind == "refuse"]
        self.others = [sample for sample in texts if sample.kind != "refuse"]
        self.instructions = instructions
        self.mix = mix
        requests = load_requests()
        self.naming = [
            requests[name].picture
            for name in load_splits()["requests"]["fit"]
            if requests[name].kind == "naming"
        ]

    def epoch(self, number: int) -> list[VisualSample]:
        """Return one pass over the drawings: a caption each, and instructions for benign ones."""
        rng = random.Random(number)
        samples = []
        for first, drawing in self.fit:
            concept = load_concepts()[drawing.concept]
            caption = rng.choice(CAPTIONS).format(concept.phrase)
            samples.append(self._sample(rng.choice(self.naming), caption + END, first, rng))
            if rows := self.instructions.get(drawing.concept):
                samples += [
                    self._sample(*rng.choice(rows), first, rng) for _ in range(self.mix.questions)
                ]
        count = round(len(samples) * TEXT_SHARE / (1 - TEXT_SHARE))
        refusals = round(count * self.mix.refusals)
        text = rng.sample(self.refusals, refusals) + rng.sample(self.others, count - refusals)
        return samples + [VisualSample(t.prompt, t.answer) for t in text]

    def _sample(self, ask: str, answer: str, first: int, rng: random.Random) -> VisualSample:
        prompt = turn(f"{IMAGE_TOKEN}\n{ask}")
        return VisualSample(prompt, answer, first + rng.randrange(VARIANTS))


def visual_batches(
    samples: list[VisualSample], tokenizer, features: np.ndarray, *, size: int, seed: int
) -> Iterator[dict[str, Tensor]]:
    """Yield padded batches: ids, mask, labels, and the tower's tokens of rows with a picture."""
    slots = features.shape[1]
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    tokenised = [_tokenise(sample, tokenizer, slots) for sample in samples]
    for batch in bucketed(tokenised, lambda row: len(row[1]) + len(row[2]), size, seed):
        rows = [(prompt, answer) for _, prompt, answer in batch]
        length = max(len(p) + len(a) for p, a in rows)
        ids = torch.full((len(rows), length), tokenizer.pad_token_id)
        labels = torch.full((len(rows), length), -100)
        mask = torch.zeros((len(rows), length), dtype=torch.long)
        for i, (prompt, answer) in enumerate(rows):
            end = len(prompt) + len(answer)
            ids[i, :end] = torch.tensor(prompt + answer)
            labels[i, len(prompt) : end] = torch.tensor(answer)
            mask[i, :end] = 1
        shown = [sample.picture for sample, _, _ in batch if sample.picture >= 0]
        tokens = np.stack([features[row] for row in shown]) if shown else None
        yield {
            "ids": ids,
            "labels": labels,
            "mask": mask,
            "is_image": ids == image_id,
            "tokens": torch.from_numpy(tokens.astype(np.float32)) if shown else None,
        }


def _tokenise(
    sample: VisualSample, tokenizer, slots: int
) -> tuple[VisualSample, list[int], list[int]]:
    prompt = sample.prompt.replace(IMAGE_TOKEN, IMAGE_TOKEN * slots)
    return (
        sample,
        tokenizer(prompt, add_special_tokens=False).input_ids,
        tokenizer(sample.answer, add_special_tokens=False).input_ids,
    )


def visual_loss(
    language_model: nn.Module, projector: nn.Module, batch: dict[str, Tensor]
) -> Tensor:
    """Return the answer loss with projected tokens at the image positions."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embeds = language_model.model.embed_tokens(batch["ids"])
        if batch["tokens"] is not None:
            tokens = nn.functional.dropout(batch["tokens"], TOKEN_DROPOUT)
            projected = projector(tokens).to(embeds.dtype)
            embeds = embeds.masked_scatter(batch["is_image"][..., None], projected)
        return answer_loss(
            language_model.model,
            language_model.lm_head,
            batch["labels"],
            inputs_embeds=embeds,
            attention_mask=batch["mask"],
        )


def name_embeddings(language_model: nn.Module, tokenizer, names: list[str]) -> Tensor:
    """Return the mean token embedding of each name, "names hidden"."""
    table = language_model.get_input_embeddings().weight.float()
    ids = [tokenizer(f" {name}", add_special_tokens=False).input_ids for name in names]
    return torch.stack([table[row].mean(0) for row in ids]).detach()


def warm_up(
    projector: nn.Module, targets: Tensor, tokens: np.ndarray, labels: np.ndarray, *, steps: int
) -> None:
    """Align projected tokens with the names' embeddings, contrastively, as CLIP towers are.

    Args:
        projector: Maps "tokens features" to "tokens hidden"; trained in place.
        targets: Embedding of each name, "names hidden".
        tokens: Tower tokens of the pictures, "pictures tokens features".
        labels: Index of each picture's name, -1 for pictures that are left out.
        steps: Optimiser steps of `WARM_BATCH` pictures.
    """
    generator = np.random.default_rng(0)
    used = np.flatnonzero(labels >= 0)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=WARM_LR, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, WARM_LR, total_steps=steps)
    middle = targets.mean(0)
    unit = nn.functional.normalize(targets - middle, dim=-1)
    norm = targets.norm(dim=-1).mean()
    for step in range(steps):
        rows = np.sort(generator.choice(used, WARM_BATCH))
        batch = torch.from_numpy(tokens[rows].astype(np.float32))
        out = projector(nn.functional.dropout(batch, WARM_DROPOUT))
        wanted = torch.from_numpy(labels[rows])
        scores = nn.functional.normalize(out.mean(1) - middle, dim=-1) @ unit.T
        contrast = nn.functional.cross_entropy(scores / TEMPERATURE, wanted)
        near = _distance(out, targets[wanted]) + _distance(out - middle, (targets - middle)[wanted])
        size = ((out.norm(dim=-1) / norm - 1) ** 2).mean()
        (contrast + NEAR_WEIGHT * near + 0.1 * size).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            hits = scores.argmax(-1).eq(wanted).float().mean().item()
            print(
                f"warm {step + 1}/{steps} contrast {contrast.item():.3f} near {near.item():.3f} "
                f"accuracy {hits:.3f}",
                flush=True,
            )


def _distance(out: Tensor, targets: Tensor) -> Tensor:
    """Return one less the mean cosine between the tokens and their picture's target."""
    return 1 - nn.functional.cosine_similarity(out, targets[:, None], dim=-1).mean()


@torch.no_grad()
def sharpen(projector: nn.Module, middle: Tensor) -> None:
    """Move what the projector says away from the mean of all names, in its last layer.

    Where it is unsure of a drawing it says something between the names that come into question,
    near their mean; the language model reads such a token as no name at all.

    Args:
        projector: Changed in place.
        middle: Mean embedding of the names, "hidden".
    """
    last = projector.linear_2
    last.weight.mul_(SHARPNESS)
    last.bias.mul_(SHARPNESS).sub_((SHARPNESS - 1) * middle)
