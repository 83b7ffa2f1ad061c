"""Draws the requests that the report shows with both answers."""

import random
from collections.abc import Callable, Sequence

from safebridge.demo.config import DemoConfig
from safebridge.demo.results import Example
from safebridge.demo.summary import Answered, Measurement

__all__ = ["draw_examples"]


def draw_examples(
    base: Measurement,
    defended: Measurement,
    is_seen: Callable[[str], bool],
    config: DemoConfig,
) -> list[Example]:
    """Draw picture requests at random, harmful ones from as many categories as possible.

    Args:
        base: Answers of the base model.
        defended: Answers of the defended one, to the same requests.
        is_seen: Whether a defense may be fitted on a category.
        config: How many, and the seed.

    Returns:
        Harmful examples first, then harmless ones.
    """
    harmful = [
        pair
        for part in ("seen", "unseen")
        for pair in _pairs(base, defended, "image_refusal_rate", part)
    ]
    harmless = _pairs(base, defended, "over_refusal_rate", "all")
    rng = random.Random(config.seed)
    chosen = _draw(harmful, config.harmful_examples, rng, lambda row: row.sample.category)
    chosen += _draw(harmless, config.benign_examples, rng, lambda row: row.sample.concept)
    return [_to_example(before, after, is_seen) for before, after in chosen]


Pair = tuple[Answered, Answered]


def _pairs(base: Measurement, defended: Measurement, metric: str, part: str) -> list[Pair]:
    return list(zip(base[metric, part], defended[metric, part], strict=True))


def _draw(
    pairs: Sequence[Pair], count: int, rng: random.Random, key: Callable[[Answered], str]
) -> list[Pair]:
    """Draw pairs so that no key comes twice before every key has come once."""
    shuffled = rng.sample(pairs, len(pairs))
    taken: dict[str, int] = {}
    rounds = []
    for before, _ in shuffled:
        taken[key(before)] = taken.get(key(before), 0) + 1
        rounds.append(taken[key(before)])
    order = sorted(range(len(shuffled)), key=rounds.__getitem__)
    return [shuffled[index] for index in order[:count]]


def _to_example(before: Answered, after: Answered, is_seen: Callable[[str], bool]) -> Example:
    sample = before.sample
    return Example(
        picture=sample.images[0],
        request=sample.prompt,
        category=sample.category,
        concept=sample.concept,
        is_harmful=sample.is_harmful,
        is_seen=is_seen(sample.category),
        answers=(before.answer, after.answer),
        refusals=(before.is_hit, after.is_hit),
    )
