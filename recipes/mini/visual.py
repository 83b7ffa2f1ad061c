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
TOKEN_DROPOUT = 0.15


@dataclass(frozen=True)
class Mix:
    """Share of text-only samples, and of refusals among them, in the first pass and later."""

    first: tuple[float, float]
    later: tuple[float, float]
    first_epoch: int = 0


FIRST_MIX = Mix((0.25, 0.4), (0.3, 0.5))
"""At first the new adapter has to learn to see."""
LAST_MIX = Mix((0.5, 0.33), (0.5, 0.33), first_epoch=100)
"""At the end most texts are answered, so that a refusal needs more than a suspicious wording."""


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
                self.fit.append((first, drawing))
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
        """Return one pass over the drawings: a caption each, an instruction for benign ones."""
        rng = random.Random(self.mix.first_epoch + number)
        samples = []
        for first, drawing in self.fit:
            concept = load_concepts()[drawing.concept]
            caption = rng.choice(CAPTIONS).format(concept.phrase)
            samples.append(self._sample(rng.choice(self.naming), caption + END, first, rng))
            if rows := self.instructions.get(drawing.concept):
                samples.append(self._sample(*rng.choice(rows), first, rng))
        text_share, refusal_share = self.mix.later if number else self.mix.first
        count = round(len(samples) * text_share / (1 - text_share))
        refusals = round(count * refusal_share)
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
) -> float:
    """Align projected tokens with the names' embeddings, contrastively, as CLIP towers are.

    Args:
        projector: Maps "tokens features" to "tokens hidden"; trained in place.
        targets: Embedding of each name, "names hidden".
        tokens: Tower tokens of the pictures, "pictures tokens features".
        labels: Index of each picture's name, -1 for pictures that are left out.
        steps: Optimiser steps of 256 pictures.

    Returns:
        Accuracy over the last 50 batches.
    """
    generator = np.random.default_rng(0)
    used = np.flatnonzero(labels >= 0)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    unit = nn.functional.normalize(targets - targets.mean(0), dim=-1)
    norm = targets.norm(dim=-1).mean()
    hits: list[float] = []
    for step in range(steps):
        rows = np.sort(generator.choice(used, 256))
        batch = torch.from_numpy(tokens[rows].astype(np.float32))
        batch = batch * (torch.rand_like(batch) > 0.1) / 0.9
        wanted = torch.from_numpy(labels[rows])
        out = projector(batch)
        centred = nn.functional.normalize(out.mean(1) - targets.mean(0), dim=-1)
        contrast = nn.functional.cross_entropy(
            centred @ unit.T / TEMPERATURE, wanted, label_smoothing=0.05
        )
        near = 1 - nn.functional.cosine_similarity(out, targets[wanted][:, None], dim=-1).mean()
        size = ((out.norm(dim=-1) / norm - 1) ** 2).mean()
        (contrast + 0.5 * near + 0.1 * size).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        hits.append((centred @ unit.T).argmax(-1).eq(wanted).float().mean().item())
        if step % 100 == 0:
            print(
                f"warm {step}/{steps} contrast {contrast.item():.3f} near {near.item():.3f} "
                f"accuracy {np.mean(hits[-50:]):.3f}",
                flush=True,
            )
    return float(np.mean(hits[-50:]))
