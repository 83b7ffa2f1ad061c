"""Stage `answers`: the language model's own answers to benign requests, cached as JSON lines."""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safebridge.data.tables import (
    Concept,
    load_concepts,
    load_general_requests,
    load_requests,
    load_splits,
)

SYSTEM = "Answer in one short sentence."
MAX_NEW_TOKENS = 30
BATCH = 64
ACT_PER_BENIGN_CONCEPT = {True: 9, False: 4}  # with pictures, without
NEUTRAL_PER_CONCEPT = 3


def turn(prompt: str, system: str = "") -> str:
    """Return one user turn in the language model's chat format."""
    head = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    return f"{head}<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


def first_sentence(text: str) -> str:
    """Return the first sentence, or the whole text if it does not end."""
    text = " ".join(text.split())
    match = re.match(r".{12,}?[.!?](?=\s|$)", text)
    return match.group(0) if match else text


def benign_requests(seed: int) -> Iterator[dict[str, str]]:
    """Yield every benign request whose answer is wanted, with its concept and template."""
    rng = random.Random(seed)
    requests = load_requests()
    fit = [requests[name] for name in load_splits()["requests"]["fit"]]
    acts = [r for r in fit if r.kind == "act"]
    neutrals = [r for r in fit if r.kind == "neutral"]
    for concept in load_concepts().values():
        yield from _of_concept(concept, acts, neutrals, rng)
    for number, prompt in enumerate(load_general_requests()["fit"]):
        yield {"prompt": prompt, "concept": "", "request": f"general-{number:02d}"}


def _of_concept(
    concept: Concept, acts: list, neutrals: list, rng: random.Random
) -> Iterator[dict[str, str]]:
    count = 0 if concept.is_harmful else ACT_PER_BENIGN_CONCEPT[bool(concept.icons)]
    chosen = rng.sample(acts, count) + rng.sample(neutrals, NEUTRAL_PER_CONCEPT)
    for request in chosen:
        yield {
            "prompt": request.text.format(concept.phrase),
            "concept": concept.name,
            "request": request.name,
        }


def build_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path, seed: int
) -> None:
    """Answer every benign request greedily; a file that is part-way done is continued."""
    rows = sorted(benign_requests(seed), key=lambda row: len(row["prompt"]))
    done = len(out.read_text().splitlines()) if out.exists() else 0
    tokenizer.padding_side = "left"
    with out.open("a") as file:
        for start in range(done, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            for row, answer in zip(batch, _generate(model, tokenizer, batch), strict=True):
                file.write(json.dumps({**row, "answer": first_sentence(answer)}) + "\n")
            file.flush()
            print(f"answers {min(start + BATCH, len(rows))}/{len(rows)}", flush=True)


def _generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, str]]
) -> list[str]:
    prompts = [turn(row["prompt"], SYSTEM) for row in rows]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    return tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
