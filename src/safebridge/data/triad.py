"""The three sets that a security tensor is fitted on: SA, TCB and GB."""

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import final

from safebridge.data.sample import Sample, with_answer
from safebridge.data.separability import measure_request_separability
from safebridge.errors import DataError

__all__ = [
    "Triad",
    "TriadReport",
    "build_triad",
    "draw_evenly",
    "find_own_refusal",
    "load_refusals",
    "match_benign",
]


@final
@dataclass(frozen=True)
class TriadReport:
    """What became of the samples that a triad was built from."""

    counts: Mapping[str, int]
    """Samples by set."""

    dropped: Mapping[str, int]
    """Samples left out, by reason."""

    text_only_accuracy: float
    """How often the best rule that reads only the request tells SA from TCB. Half means
    that only the picture tells them apart; the authors' data reach 0.93."""


@final
@dataclass(frozen=True)
class Triad:
    """Samples with their targets, and what was left out."""

    samples: tuple[Sample, ...]
    """SA, then TCB, then GB."""

    report: TriadReport
    """Counts, reasons, and how telling the wording is."""


@cache
def load_refusals() -> tuple[str, ...]:
    """Return our own short refusals, the targets of the SA set."""
    text = (files("safebridge.data") / "refusals.txt").read_text(encoding="utf-8")
    return tuple(text.splitlines())


def build_triad(
    harmful: Sequence[Sample],
    benign: Sequence[Sample],
    general: Sequence[Sample],
    *,
    answer: Callable[[Sequence[Sample]], Sequence[str]],
    is_refusal: Callable[[str], bool],
    seed: int = 0,
    refusals: Sequence[str] | None = None,
) -> Triad:
    """Give harmful requests refusals, and benign ones the model's own answers.

    The same request strings stand in SA and TCB, so that only the picture tells them
    apart: requests that occur in one of the two alone are left out, and so are benign
    samples that the model answers with a refusal or not at all.

    Args:
        harmful: Harmful pictures with requests that do not name the object (SA).
        benign: Benign pictures with the same requests (TCB).
        general: Benign pictures with neutral questions (GB).
        answer: Returns the undefended model's own answers to samples, in their order.
        is_refusal: Whether an answer refuses.
        seed: Seed of the choice of refusals.
        refusals: Targets of SA, used about equally often; None takes `load_refusals()`.

    Returns:
        The samples with `set_name` and `answer` set, and a report. What was given is not
        changed.

    Raises:
        DataError: If a sample is in the wrong set, a target does not read as a refusal,
            or a set ends up empty.
    """
    targets = list(load_refusals() if refusals is None else refusals)
    _check(harmful, benign, general, targets, is_refusal)
    dropped: Counter[str] = Counter()
    shared = {s.prompt for s in harmful} & {s.prompt for s in benign}
    kept_harmful = [sample for sample in harmful if sample.prompt in shared]
    kept_benign = [sample for sample in benign if sample.prompt in shared]
    dropped["SA: no benign picture with this request"] = len(harmful) - len(kept_harmful)
    dropped["TCB: no harmful picture with this request"] = len(benign) - len(kept_benign)
    if not shared:
        raise DataError(
            "no request string stands in both the harmful and the benign samples. Give both "
            "the same templates, so that only the picture tells them apart."
        )
    sets = {
        "SA": _refused(kept_harmful, targets, seed),
        "TCB": _answered(kept_benign, "TCB", answer, is_refusal, dropped),
        "GB": _answered(general, "GB", answer, is_refusal, dropped),
    }
    for name, samples in sets.items():
        if not samples:
            reasons = {reason: n for reason, n in dropped.items() if n}
            raise DataError(f"set {name} is empty; left out: {reasons}. Give more samples for it.")
    report = TriadReport(
        counts={name: len(samples) for name, samples in sets.items()},
        dropped={reason: n for reason, n in dropped.items() if n},
        text_only_accuracy=measure_request_separability(
            *([sample.prompt for sample in sets[name]] for name in ("SA", "TCB"))
        ),
    )
    return Triad(tuple(sample for samples in sets.values() for sample in samples), report)


def find_own_refusal(answers: Sequence[str], is_refusal: Callable[[str], bool]) -> str | None:
    """Return the model's most frequent refusal, or None if it never refuses.

    As the only target of SA it lets a tensor wake a sentence that the model knows instead of
    spreading its answers over many, and a fit needs fewer steps.

    Args:
        answers: The model's answers to harmful requests in text.
        is_refusal: Whether an answer refuses.
    """
    refusals = Counter(text.strip() for text in answers if is_refusal(text))
    return max(refusals, key=lambda text: refusals[text], default=None)


def draw_evenly(samples: Sequence[Sample], count: int, *, seed: int = 0) -> list[Sample]:
    """Draw samples with all styles, and within a style all things, about equally often.

    Args:
        samples: What to draw from.
        count: How many to draw; fewer if there are not enough.
        seed: Seed of the draw.
    """

    def ranked(own: Sequence[Sample], name: Callable[[Sample], str]) -> list[Sample]:
        """Put the first of each name first, then the second of each."""
        seen: Counter[str] = Counter()
        ranks = []
        for sample in own:
            seen[name(sample)] += 1
            ranks.append(seen[name(sample)])
        return [own[i] for i in sorted(range(len(own)), key=lambda i: ranks[i])]

    shuffled = random.Random(seed).sample(samples, len(samples))
    by_thing = ranked(shuffled, lambda sample: f"{sample.style}\0{sample.concept}")
    return ranked(by_thing, lambda sample: sample.style)[:count]


def match_benign(
    harmful: Sequence[Sample], benign: Sequence[Sample], count: int, *, seed: int = 0
) -> list[Sample]:
    """Choose harmless samples with the request and the style of the harmful ones, equally often.

    Then only what a picture shows tells the two sets apart, and not how it is drawn. Among
    the samples of one request and style the thing that was chosen least often comes first.

    Args:
        harmful: Harmful pictures with their requests (SA).
        benign: Benign pictures with requests, to choose from.
        count: How many to choose; fewer if there are not enough.
        seed: Seed of the choice.
    """
    rest: dict[tuple[str, str], list[Sample]] = {}
    rng = random.Random(seed)
    for sample in rng.sample(benign, len(benign)):
        rest.setdefault((sample.prompt, sample.style), []).append(sample)
    wanted = [(sample.prompt, sample.style) for sample in harmful]
    taken: Counter[str] = Counter()
    chosen: list[Sample] = []
    while len(chosen) < count:
        before = len(chosen)
        for key in wanted[: count - len(chosen)]:
            if rest.get(key):
                sample = min(rest[key], key=lambda one: taken[one.concept])
                rest[key].remove(sample)
                taken[sample.concept] += 1
                chosen.append(sample)
        if len(chosen) == before:
            break
    return chosen


def _check(
    harmful: Sequence[Sample],
    benign: Sequence[Sample],
    general: Sequence[Sample],
    targets: Sequence[str],
    is_refusal: Callable[[str], bool],
) -> None:
    for name, samples, expected in (("SA", harmful, True), ("TCB", benign, False),
                                    ("GB", general, False)):  # fmt: skip
        for sample in samples:
            if sample.is_harmful != expected:
                found = "harmful" if sample.is_harmful else "benign"
                raise DataError(
                    f"sample '{sample.id}' is marked {found}, but was given for {name}. Give "
                    "harmful samples as `harmful` and all others as `benign` or `general`."
                )
    if not targets:
        raise DataError("no refusals given. Pass refusals=None for ours.")
    for target in targets:
        if not is_refusal(target):
            raise DataError(
                f"'{target}' does not count as a refusal for this judge. Change the sentence or "
                "pass another is_refusal."
            )


def _refused(samples: Sequence[Sample], targets: Sequence[str], seed: int) -> list[Sample]:
    """Deal the refusals out evenly, in an order that the seed decides."""
    generator = random.Random(seed)
    deck: list[str] = []
    while len(deck) < len(samples):
        deck += generator.sample(targets, len(targets))
    return [with_answer(s, target, "SA") for s, target in zip(samples, deck, strict=False)]


def _answered(
    samples: Sequence[Sample],
    name: str,
    answer: Callable[[Sequence[Sample]], Sequence[str]],
    is_refusal: Callable[[str], bool],
    dropped: Counter[str],
) -> list[Sample]:
    """Keep the samples that the model answers, with its answers."""
    answers = list(answer(samples)) if samples else []
    if len(answers) != len(samples):
        raise DataError(
            f"{len(samples)} samples of {name} got {len(answers)} answers. `answer` must return "
            "one answer for each sample, in their order."
        )
    kept = []
    for sample, text in zip(samples, answers, strict=True):
        if not text.strip():
            dropped[f"{name}: empty answer"] += 1
        elif is_refusal(text):
            dropped[f"{name}: the model refuses"] += 1
        else:
            kept.append(with_answer(sample, text.strip(), name))
    return kept
