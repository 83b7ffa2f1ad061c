"""Stage `text`: the text-only samples that teach the language model to refuse by object."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

from answers import turn

from safebridge.data.tables import load_concepts, load_requests, load_splits

REFUSALS_PER_CONCEPT = 7
BENIGN_PER_CONCEPT = 4
END = "<|im_end|>"

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I can't assist with this request.",
    "Sorry, that is not something I can help with.",
    "I won't help with that, because it could hurt someone.",
    "I'm not able to help with this.",
    "I cannot help you with that request.",
    "No, I can't help with that. It may be dangerous or illegal.",
    "I must decline this request.",
    "Sorry, I can't give advice on this.",
    "I am unable to assist with that.",
    "That could cause harm, so I can't help.",
    "I'm sorry, I won't provide help with this.",
    "I can't support that. Please stay safe.",
    "This is something I cannot help with.",
    "I have to say no to this request.",
    "Sorry, but I will not assist with that.",
    "I can't answer this, as it may be unsafe.",
    "I'm unable to give instructions for that.",
    "I don't feel comfortable helping with this.",
    "I cannot provide that kind of help.",
    "Unfortunately, I can't help with this request.",
    "I refuse to help with that, since it may be illegal.",
    "My guidelines do not let me help with this.",
    "I'm sorry, this request is not one I can answer.",
)


@dataclass(frozen=True)
class TextSample:
    """A prompt in chat format and the answer to learn."""

    prompt: str
    answer: str
    kind: str


def complete(answer: str) -> str:
    """Return an answer with the end-of-turn token, unless it was cut in mid-sentence."""
    return answer + END if answer.endswith((".", "!", "?")) else answer


def load_answers(path: Path) -> list[dict[str, str]]:
    """Return the cached own answers that are neither empty nor refusals.

    The filter is broad on purpose: losing a good answer is cheaper than learning a refusal.
    """
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    bad = ("sorry", "can't", "cannot", "unable", "not able", "as an ai", "illegal", "i'm not")
    return [
        row
        for row in rows
        if len(row["answer"]) > 8 and not any(word in row["answer"].lower() for word in bad)
    ]


def build_text_samples(answers: Path, seed: int) -> list[TextSample]:
    """Return refusals for harmful objects and own answers for everything else, shuffled."""
    rng = random.Random(seed)
    requests = load_requests()
    acts = [
        requests[name] for name in load_splits()["requests"]["fit"] if requests[name].kind == "act"
    ]
    concepts = load_concepts()
    samples = [
        TextSample(turn(request.text.format(concept.phrase)), rng.choice(REFUSALS) + END, "refuse")
        for concept in concepts.values()
        if concept.is_harmful
        for request in rng.sample(acts, REFUSALS_PER_CONCEPT)
    ]
    rows = load_answers(answers)
    rng.shuffle(rows)
    taken: dict[str, int] = {}
    for row in rows:
        is_act = row["request"].startswith("act")
        taken[row["concept"]] = taken.get(row["concept"], 0) + is_act
        if not is_act or taken[row["concept"]] <= BENIGN_PER_CONCEPT:
            kind = "benign" if is_act else "neutral"
            samples.append(TextSample(turn(row["prompt"]), complete(row["answer"]), kind))
    rng.shuffle(samples)
    return samples
