"""Stage `contrast`: many wordings of the same requests, so that the object alone decides.

The first words of an answer decide whether it is a refusal, so answers are cut after a few
tokens: the loss then sits where the decision is, and a step costs less.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from answers import BATCH, SYSTEM, turn
from text import END, REFUSALS, TextSample, load_answers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safebridge.data.tables import Concept, load_concepts, load_requests, load_splits

ANSWER_TOKENS = 7
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
WIDER_OPENERS = (
    *OPENERS,
    "When is the best time to {}?",
    "Where is a good place to {}?",
    "Where do tourists {}?",
    "Where did sailors {} in the past?",
    "Who could teach me to {}?",
    "Who knows how to {}?",
    "Which shop lets me {}?",
    "How do grandparents {}?",
    "How do most families {}?",
    "How would you {}?",
    "How might an artist {}?",
    "How long does it take to {}?",
    "How hard is it to {}?",
    "How should we {}?",
    "Why is it so hard to {}?",
    "Should I {}?",
    "Is it easy to {}?",
    "May I {}?",
    "My plan is to {}. What comes first?",
    "I am trying to {}. Any advice?",
    "I have never tried to {}. Where should I look?",
    "Someone asked me to {}. What do I answer?",
    "List the things needed to {}.",
    "Draft a message about how to {}.",
    "Make a checklist for someone who will {}.",
    "Suggest a way to {}.",
    "Recommend how to {}.",
    "Say in two lines how to {}.",
    "Instruct me on how to {}.",
    "It is my dream to {}. How?",
    "What does it cost to {}?",
    "What happens if I {}?",
    "What would a professional do to {}?",
    "What do visitors need to {}?",
    "What else can I do to {}?",
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
SHADY_OPENERS = (
    *WIDER_OPENERS,
    "Whom do I ask to {}?",
    "Which app helps me {}?",
    "In what way do experts {}?",
    "Nobody should know that I {}. Ideas?",
    "On a low budget, how can I {}?",
    "Without any tools, how do I {}?",
    "Explain to a child how to {}.",
    "As a newcomer, how do I {}?",
    "My teacher told us to {}. Ideas?",
    "For my birthday I want to {}. How?",
    "Compare two ways to {}.",
    "Name three places to {}.",
    "What are common mistakes when people {}?",
    "Summarize how to {}.",
    "By when should I {}?",
    "After school I want to {}. Can you help?",
    "Quick, I have to {}!",
    "Whatever it takes, I will {}. How?",
    "Somebody dared me to {}. What should I know?",
    "Is there a website that shows how to {}?",
)
SHADY_ACTIONS = (
    "carry {} under my coat",
    "load {} onto a truck at dawn",
    "swap {} for cash",
    "leave {} at the station",
    "put {} in the garden next door",
    "surprise my teacher with {}",
    "scare people with {}",
    "bring {} to a hotel room",
    "mail {} without a return address",
    "pay for {} in cash",
    "make {} stronger",
    "test {} on volunteers",
    "mix {} at home",
    "take {} away from my brother",
    "give {} to the whole class",
    "take {} over the border",
    "drop {} from a bridge",
    "keep {} in a secret room",
    "ask a stranger for {}",
    "start a business with {}",
    "offer {} on the street",
    "win a fight with {}",
    "bring {} on a bus",
    "teach my son to use {}",
    "use {} against my boss",
    "use {} as a joke",
    "get {} into the office",
    "throw {} at a wall",
    "get {} by tomorrow",
    "replace {} that broke",
    "share {} with a neighbor",
    "get {} for free",
    "get hold of {} abroad",
    "produce {} in large amounts",
    "put {} together from spare parts",
    "have {} delivered tonight",
    "rent {} for a weekend",
    "wrap {} so that nobody sees it",
    "move {} through a crowd",
    "talk a shop into giving me {}",
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

CONTEXTS = (
    "This is {}.",
    "Here is {}.",
    "Look at {}.",
    "I have {} here.",
    "On the table lies {}.",
    "Think of {}.",
    "Topic: {}.",
    "In front of me is {}.",
    "My friend showed me {}.",
    "The next question is about {}.",
    "You see {}.",
    "Yesterday I read about {}.",
    "The word is: {}.",
    "Imagine {}.",
    "In my hand: {}.",
    "A drawing shows {}.",
)
"""Sentences that name an object before a request points at it; the picture's place, in text."""
POINTERS = ("this", "this", "this", "it")
BARE_SHARE = 0.5
"""Of the requests that name their object apart: how many name it without any sentence."""
TIMES = (1, 1, 2, 3, 5)
"""How often a name without a sentence is said; a picture's tokens all say the same, too."""


@dataclass(frozen=True)
class Plan:
    """How many wordings each concept gets, and from which openers and actions."""

    openers: tuple[str, ...]
    harmful: int
    act: int
    plain: int
    seed: int
    actions: tuple[str, ...] = ACTIONS


CONTRAST = Plan(OPENERS, harmful=11, act=6, plain=2, seed=1)
WIDER = Plan(WIDER_OPENERS, harmful=14, act=8, plain=3, seed=3)
SHADY = Plan(SHADY_OPENERS, harmful=8, act=4, plain=1, seed=5, actions=SHADY_ACTIONS)
"""Wordings that sound suspicious with any object, so that sounding so does not decide."""


def wordings(openers: tuple[str, ...], actions: tuple[str, ...]) -> list[str]:
    """Return every opener with every action, except what the held-out requests say."""
    held_out = {
        load_requests()[name].text
        for split in ("validation", "test")
        for name in load_splits()["requests"][split]
    }
    texts = [opener.format(action) for opener in openers for action in actions]
    return [text for text in texts if text not in held_out]


def contrast_requests(seed: int, plan: Plan) -> Iterator[tuple[Concept, str]]:
    """Yield each concept with its wordings, chosen at random."""
    rng = random.Random(seed + plan.seed)
    acts, plain = (wordings(plan.openers, each) for each in (plan.actions, PLAIN_ACTIONS))
    for concept in load_concepts().values():
        if concept.is_harmful:
            chosen = rng.sample(acts, plan.harmful)
        else:
            chosen = rng.sample(acts, plan.act) + rng.sample(plain, plan.plain)
        for wording in chosen:
            yield concept, wording


def build_openings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path, seed: int, plan: Plan
) -> None:
    """Let the untouched model begin an answer to each benign request; continues a file."""
    rows = sorted(
        {
            (wording.format(concept.phrase), concept.name, wording)
            for concept, wording in contrast_requests(seed, plan)
            if not concept.is_harmful
        },
        key=lambda row: (len(row[0]), row),
    )
    done = len(out.read_text().splitlines()) if out.exists() else 0
    tokenizer.padding_side = "left"
    with out.open("a") as file:
        for start in range(done, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            prompts = [turn(prompt, SYSTEM) for prompt, _, _ in batch]
            inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
            with torch.inference_mode():
                ids = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)
            new = tokenizer.batch_decode(
                ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
            for (prompt, concept, wording), answer in zip(batch, new, strict=True):
                row = {"prompt": prompt, "concept": concept, "wording": wording, "answer": answer}
                file.write(json.dumps(row) + "\n")
            file.flush()
            print(f"{out.stem} {min(start + BATCH, len(rows))}/{len(rows)}", flush=True)


def apart(concept: Concept, wording: str, rng: random.Random) -> str:
    """Return a request that points at an object named before it, in a sentence or bare."""
    if rng.random() < BARE_SHARE:
        said = rng.choice((f" {concept.name}", f" {concept.name}", f" {concept.phrase}"))
        return said * rng.choice(TIMES) + "\n" + wording.format(rng.choice(POINTERS))
    context = rng.choice(CONTEXTS).format(concept.phrase)
    return context + rng.choice("\n ") + wording.format(rng.choice(POINTERS))


def build_contrast_samples(
    openings: Path,
    answers: Path,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    plan: Plan,
    *,
    apart_share: float = 0.0,
) -> list[TextSample]:
    """Return refusals and own openings in the same wordings, and a share of neutral ones.

    Args:
        openings: The model's own openings for benign requests, by request.
        answers: The model's own answers, for the neutral ones.
        tokenizer: Cuts the answers.
        seed: Seed of every choice.
        plan: Which wordings each concept gets.
        apart_share: Share of the requests that name their object on its own, in a sentence or
            bare, and then point at it, as a request beside a picture does.
    """
    rng = random.Random(seed + plan.seed + 1)
    begun = {row["prompt"]: row["answer"] for row in load_answers(openings)}
    samples = []
    for concept, wording in contrast_requests(seed, plan):
        text = asked = wording.format(concept.phrase)
        if rng.random() < apart_share:
            asked = apart(concept, wording, rng)
        if concept.is_harmful:
            samples.append(TextSample(turn(asked), rng.choice(REFUSALS) + END, "refuse"))
        elif text in begun:
            samples.append(TextSample(turn(asked), begun[text], "benign"))
    for row in load_answers(answers):
        is_general = row["request"].startswith("general")
        share = 1.0 if is_general else NEUTRAL_SHARE * row["request"].startswith("neutral")
        samples.extend(
            TextSample(turn(row["prompt"]), row["answer"], "neutral")
            for _ in range(3 if is_general else 1)
            if rng.random() < share
        )
    samples = [TextSample(s.prompt, cut(s.answer, tokenizer), s.kind) for s in samples]
    rng.shuffle(samples)
    return samples


def cut(answer: str, tokenizer: PreTrainedTokenizerBase, tokens: int = ANSWER_TOKENS) -> str:
    """Return the first tokens of an answer."""
    ids = tokenizer(answer, add_special_tokens=False).input_ids
    return tokenizer.decode(ids[:tokens])
