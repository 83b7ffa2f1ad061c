"""Stage `contrast`: many wordings of the same requests, so that the object alone decides.

The first words of an answer decide whether it is a refusal, so answers are cut after a few
tokens: the loss then sits where the decision is, and a step costs less.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from answers import BATCH, SYSTEM, turn
from text import END, REFUSALS, TextSample, load_answers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safebridge.data.tables import Concept, load_concepts, load_requests, load_splits

ANSWER_TOKENS = 7
HARMFUL_PER_CONCEPT = 11
ACT_PER_BENIGN = 6
PLAIN_PER_BENIGN = 2
NEUTRAL_SHARE = 0.35

OPENERS = (
    "How do I {}?",
    "How can I {}?",
    "How could someone {}?",
    "How does one {}?",
    "Tell me how to {}.",
    "Explain how to {}.",
    "Show me how to {}.",
    "I want to {}. What now?",
    "I would love to {}. Any tips?",
    "Help me {}.",
    "Please help my friend {}.",
    "Can you tell me how to {}?",
    "Give me three tips to {}.",
    "Write a guide to {}.",
    "Write down how to {}.",
    "What do I need to {}?",
    "What is the simplest way to {}?",
    "What is a smart way to {}?",
    "Is there a trick to {}?",
    "Could you describe how to {}?",
    "My sister wants to {}. What should she do?",
    "We plan to {}. Where do we begin?",
    "Which steps are needed to {}?",
    "Let me know how to {}.",
)
ACTIONS = (
    "make {}",
    "make {} cheaply",
    "make {} from scratch",
    "make {} with my cousin",
    "build {} in the shed",
    "create {}",
    "prepare {} in the kitchen",
    "get {}",
    "get {} this week",
    "get {} at night",
    "get {} for a party",
    "buy {}",
    "buy {} in private",
    "buy {} from a stranger",
    "find {} near me",
    "find someone who sells {}",
    "order {} from abroad",
    "send {} to a friend",
    "sell {}",
    "sell {} at school",
    "use {}",
    "use {} on somebody",
    "use {} at work",
    "use {} in the city",
    "hide {}",
    "hide {} in the car",
    "carry {} around",
    "bring {} into a building",
    "take {} to a concert",
    "sneak {} past my parents",
    "keep {} at home",
    "own {}",
    "trade {}",
    "give {} to a child",
    "surprise someone with {}",
    "collect a lot of {}",
)
PLAIN_ACTIONS = (
    "clean {}", "wash {}", "paint {}", "draw {}", "repair {}", "choose {}", "store {}",
    "decorate {}", "photograph {}", "measure {}", "open {}", "crush {}", "smash {}", "cut {}",
    "chop {}", "beat {}", "crack {}", "break {}", "burn {}", "hit {}", "shoot a photo of {}",
    "blow up a picture of {}", "kill time with {}", "attack a problem with {}", "knock over {}",
    "fire up a talk about {}", "poke {}", "punch a hole in {}", "throw {}", "drop {}", "bury {}",
    "hook {} to a rope", "get rid of {}", "hang up {}", "shake {}", "recycle {}",
    "stop {} from falling",
)  # fmt: skip


def wordings(actions: tuple[str, ...]) -> list[str]:
    """Return every opener with every action, except what the held-out requests say."""
    held_out = {
        load_requests()[name].text
        for split in ("validation", "test")
        for name in load_splits()["requests"][split]
    }
    texts = [opener.format(action) for opener in OPENERS for action in actions]
    return [text for text in texts if text not in held_out]


def contrast_requests(seed: int) -> Iterator[tuple[Concept, str]]:
    """Yield each concept's requests in random wordings."""
    rng = random.Random(seed + 1)
    acts, plain = wordings(ACTIONS), wordings(PLAIN_ACTIONS)
    for concept in load_concepts().values():
        if concept.is_harmful:
            chosen = rng.sample(acts, HARMFUL_PER_CONCEPT)
        else:
            chosen = rng.sample(acts, ACT_PER_BENIGN) + rng.sample(plain, PLAIN_PER_BENIGN)
        for text in chosen:
            yield concept, text.format(concept.phrase)


def build_openings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path, seed: int
) -> None:
    """Let the untouched model begin an answer to each benign request; continues a file."""
    rows = sorted({text for c, text in contrast_requests(seed) if not c.is_harmful}, key=len)
    done = len(out.read_text().splitlines()) if out.exists() else 0
    tokenizer.padding_side = "left"
    with out.open("a") as file:
        for start in range(done, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            prompts = [turn(row, SYSTEM) for row in batch]
            inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
            with torch.inference_mode():
                ids = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)
            new = tokenizer.batch_decode(
                ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
            for row, answer in zip(batch, new, strict=True):
                file.write(json.dumps({"prompt": row, "concept": "", "answer": answer}) + "\n")
            file.flush()
            print(f"openings {min(start + BATCH, len(rows))}/{len(rows)}", flush=True)


def build_contrast_samples(
    openings: Path, answers: Path, tokenizer: PreTrainedTokenizerBase, seed: int
) -> list[TextSample]:
    """Return refusals and own openings in the same wordings, and a share of neutral ones."""
    rng = random.Random(seed + 2)
    begun = {row["prompt"]: row["answer"] for row in load_answers(openings)}
    samples = []
    for concept, text in contrast_requests(seed):
        if concept.is_harmful:
            samples.append(TextSample(turn(text), rng.choice(REFUSALS) + END, "refuse"))
        elif text in begun:
            samples.append(TextSample(turn(text), begun[text], "benign"))
    for row in load_answers(answers):
        is_general = row["request"].startswith("general")
        share = 1.0 if is_general else NEUTRAL_SHARE * row["request"].startswith("neutral")
        samples.extend(
            TextSample(turn(row["prompt"]), row["answer"], "neutral")
            for _ in range(3 if is_general else 1)
            if rng.random() < share
        )
    samples = [TextSample(s.prompt, _cut(s.answer, tokenizer), s.kind) for s in samples]
    rng.shuffle(samples)
    return samples


def _cut(answer: str, tokenizer: PreTrainedTokenizerBase) -> str:
    ids = tokenizer(answer, add_special_tokens=False).input_ids
    return tokenizer.decode(ids[:ANSWER_TOKENS])
