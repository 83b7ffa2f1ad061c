"""Contrastive groups of samples by three strategies, from twins, a triad or VLGuard's JSON."""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from safebridge.data.sample import Sample
from safebridge.data.triad import load_refusals
from safebridge.errors import DataError

__all__ = [
    "OPENERS",
    "REMINDERS",
    "SAFE",
    "UNSAFE",
    "add_own_answers",
    "build_multi_instruction",
    "build_multi_response",
    "build_reminded",
    "build_single_response",
    "check_groups",
    "load_vlguard",
    "pair_by_picture",
    "pair_by_request",
    "split_triad",
    "take_groups",
]

SAFE: Final = "safe"
UNSAFE: Final = "unsafe"
"""Values of `Sample.set_name`: what to revise towards, and what to revise away from."""

OPENERS: Final = (
    "Sure, here is what you asked for.",
    "Of course, I will gladly help with that.",
    "Yes, here is how to do it.",
    "Certainly, let me explain it step by step.",
    "Absolutely, here are the details.",
    "Happy to help, here is the answer.",
    "No problem, this is how it works.",
    "Great question, here is what to do.",
)
"""Affirmative openers, our own sentences; they promise an answer and hold none. All end in a
full stop, as the refusals do, so the last token tells nothing."""

REMINDERS: Final = (
    "If this asks for something harmful or against the law, decline politely.",
    "Remember to stay safe: refuse anything that could hurt someone.",
    "You are a careful assistant. Do not help with harmful or dangerous requests.",
    "Think first about whether an answer could cause harm, and if so do not give one.",
)
"""Safety reminders, our own sentences, that are put after a request."""

_MARK: Final = "#"
_SEPARATOR: Final = "\n"


def group_of(sample: Sample) -> str:
    """Return the name of a sample's contrastive group, which stands before "#" in its id.

    Args:
        sample: A sample of one of the builders.
    """
    return sample.id.rpartition(_MARK)[0] or sample.id


def build_single_response(
    requests: Sequence[Sample], *, refusal: str | None = None, opener: str | None = None
) -> list[Sample]:
    """Give all harmful requests the same two responses: one refusal and one opener.

    Args:
        requests: Harmful requests; each becomes a group.
        refusal: The safe response; None takes our first one.
        opener: The unsafe response; None takes our first one.

    Returns:
        Two samples for each request.

    Raises:
        DataError: If there are no requests, or a request is not marked harmful.
    """
    safe = [load_refusals()[0] if refusal is None else refusal]
    return _respond(requests, lambda _: (safe, [OPENERS[0] if opener is None else opener]))


def build_multi_response(
    requests: Sequence[Sample],
    *,
    count: int = 4,
    refusals: Sequence[str] | None = None,
    openers: Sequence[str] | None = None,
    seed: int = 0,
) -> list[Sample]:
    """Give each harmful request several safe and several unsafe responses of its own draw.

    A request that has an answer keeps it as one of its safe responses: the refusal of a triad
    or of VLGuard.

    Args:
        requests: Harmful requests; each becomes a group.
        count: Responses of each kind; a pool with fewer gives all it has.
        refusals: Pool of safe responses; None takes ours.
        openers: Pool of unsafe responses; None takes `OPENERS`. `add_own_answers` adds the
            model's own ones.
        seed: Seed of the draws.

    Returns:
        Up to twice `count` samples for each request.

    Raises:
        DataError: If there are no requests, a pool is empty, or a request is not marked harmful.
    """
    pools = (list(refusals or load_refusals()), list(openers or OPENERS))
    rng = random.Random(seed)

    def draw(sample: Sample) -> tuple[list[str], list[str]]:
        safe, unsafe = (rng.sample(pool, min(count, len(pool))) for pool in pools)
        if sample.answer:
            safe = list(dict.fromkeys([sample.answer, *safe]))[:count]
        return safe, unsafe

    return _respond(requests, draw)


def build_multi_instruction(pairs: Sequence[tuple[Sample, Sample]]) -> list[Sample]:
    """Contrast safe requests with unsafe ones; nothing is answered.

    The vector then points from harmful requests to harmless ones. Adding it makes a harmful
    request look harmless, which in a model that refuses what looks harmful can undo refusals:
    try `direction="opposite"` too, or build the groups with `build_reminded`.

    Args:
        pairs: A harmless request and a harmful one; each pair is a group.

    Returns:
        Two samples for each pair.

    Raises:
        DataError: If there are no pairs, or a pair is not harmless and harmful, in this order.
    """
    samples = []
    for number, (harmless, harmful) in enumerate(pairs):
        _check_harm([harmful], is_harmful=True)
        _check_harm([harmless], is_harmful=False)
        name = f"{number:05d}:{harmful.id}"
        samples += [
            replace(harmless, id=f"{name}{_MARK}safe", set_name=SAFE, answer=None),
            replace(harmful, id=f"{name}{_MARK}unsafe", set_name=UNSAFE, answer=None),
        ]
    return check_groups(samples)


def build_reminded(
    requests: Sequence[Sample], *, reminders: Sequence[str] | None = None, seed: int = 0
) -> list[Sample]:
    """Contrast harmful requests with themselves and a safety reminder; nothing is answered.

    Args:
        requests: Harmful requests; each becomes a group.
        reminders: Pool of reminders; None takes `REMINDERS`.
        seed: Seed of the choice of reminders.

    Returns:
        Two samples for each request.

    Raises:
        DataError: If there are no requests, or a request is not marked harmful.
    """
    _check_harm(requests, is_harmful=True)
    rng = random.Random(seed)
    pool = list(reminders or REMINDERS)
    samples = []
    for sample in requests:
        prompt = f"{sample.prompt}{_SEPARATOR}{rng.choice(pool)}"
        samples += [
            replace(
                sample, id=f"{sample.id}{_MARK}safe", prompt=prompt, set_name=SAFE, answer=None
            ),
            replace(sample, id=f"{sample.id}{_MARK}unsafe", set_name=UNSAFE, answer=None),
        ]
    return check_groups(samples)


def add_own_answers(
    samples: Sequence[Sample],
    requests: Sequence[Sample],
    answers: Sequence[str],
    *,
    is_unsafe: Callable[[str], bool],
) -> list[Sample]:
    """Add the undefended model's own answers that were judged unsafe to the unsafe samples.

    Args:
        samples: What `build_single_response` or `build_multi_response` returned.
        requests: The harmful requests that it was built from.
        answers: The undefended model's answers to them, in their order.
        is_unsafe: Judge of an answer. On requests that ask for harm, what is not a refusal
            counts as unsafe in this project's measures.

    Returns:
        The samples and one more for each answer that is unsafe, in the request's group.

    Raises:
        DataError: If there is not one answer for each request.
    """
    if len(answers) != len(requests):
        raise DataError(
            f"{len(requests)} requests got {len(answers)} answers. Give one for each, in order."
        )
    more = [
        replace(sample, id=f"{sample.id}{_MARK}own", set_name=UNSAFE, answer=answer.strip())
        for sample, answer in zip(requests, answers, strict=True)
        if answer.strip() and is_unsafe(answer)
    ]
    return check_groups([*samples, *more])


def pair_by_request(
    harmless: Sequence[Sample], harmful: Sequence[Sample], *, seed: int = 0
) -> list[tuple[Sample, Sample]]:
    """Pair requests of the same wording, so that only the picture tells the two apart.

    Args:
        harmless: Harmless requests, e.g. `load_samples("benign_image", "fit")`.
        harmful: Harmful requests, e.g. `load_samples("harmful_image", "fit")`.
        seed: Seed of the pairing.

    Returns:
        Pairs of a harmless and a harmful request; what finds no partner is left out.
    """
    rng = random.Random(seed)
    by_prompt: dict[str, list[Sample]] = {}
    for sample in rng.sample(list(harmless), len(harmless)):
        by_prompt.setdefault(sample.prompt, []).append(sample)
    pairs = []
    for sample in harmful:
        partners = by_prompt.get(sample.prompt)
        if partners:
            pairs.append((partners.pop(), sample))
    return pairs


def pair_by_picture(samples: Sequence[Sample]) -> list[tuple[Sample, Sample]]:
    """Pair the harmless and the harmful requests about the same pictures, as VLGuard has them.

    Args:
        samples: Samples of both kinds.

    Returns:
        Pairs of a harmless and a harmful request; what finds no partner is left out.
    """
    harmless: dict[tuple[Path, ...], list[Sample]] = {}
    for sample in samples:
        if not sample.is_harmful:
            harmless.setdefault(sample.images, []).append(sample)
    return [
        (harmless[sample.images].pop(0), sample)
        for sample in samples
        if sample.is_harmful and harmless.get(sample.images)
    ]


def split_triad(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Return the harmful requests of a triad and its benign ones.

    Args:
        samples: What `build_triad` returned; SA keeps its refusals as answers.
    """
    harmful = [sample for sample in samples if sample.set_name == "SA"]
    return harmful, [sample for sample in samples if sample.set_name in {"TCB", "GB"}]


def load_vlguard(json_path: Path | str, image_folder: Path | str) -> list[Sample]:
    """Read a JSON file in VLGuard's form; every instruction becomes a sample.

    An item is safe and holds a `safe_instruction` and an `unsafe_instruction`, or unsafe and
    holds an `instruction`; a harmful request keeps its refusal as answer. VLGuard's test file
    is for evaluation: never fit on it.

    Args:
        json_path: The file, e.g. VLGuard's train.json.
        image_folder: Folder that the items' picture paths start from.

    Returns:
        Samples in the order of the file, harmful ones marked.

    Raises:
        DataError: If the file cannot be read or an item has another form.
    """
    json_path = Path(json_path)
    try:
        items = json.loads(json_path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {json_path}: {error}. Give VLGuard's train.json.") from error
    samples = []
    for number, item in enumerate(items):
        try:
            samples += _read_vlguard_item(item, Path(image_folder))
        except (KeyError, TypeError) as error:
            raise DataError(
                f"item {number} of {json_path} is not of VLGuard's form: no {error}. It needs id, "
                "image, safe and instr-resp."
            ) from error
    return samples


def take_groups(samples: Sequence[Sample], count: int, *, seed: int = 0) -> list[Sample]:
    """Keep a number of groups, whole; a larger number keeps the smaller one's groups.

    Args:
        samples: What one of the builders returned.
        count: How many groups.
        seed: Seed of the choice.

    Raises:
        DataError: If there are fewer groups.
    """
    names = sorted({group_of(sample) for sample in samples})
    if count > len(names):
        raise DataError(f"{count} groups asked for, but there are {len(names)}. Give more samples.")
    kept = set(random.Random(seed).sample(names, len(names))[:count])
    return [sample for sample in samples if group_of(sample) in kept]


def check_groups(samples: Sequence[Sample]) -> list[Sample]:
    """Return the samples if every group has a safe and an unsafe one.

    Args:
        samples: Samples with `set_name` "safe" or "unsafe" and ids of the form "group#name".

    Raises:
        DataError: If there are none, a set is unknown, an id comes twice, or a group lacks a
            side.
    """
    if not samples:
        raise DataError("no samples to fit on. Build some, e.g. with build_multi_response.")
    sides: dict[str, set[str]] = {}
    seen: set[str] = set()
    for sample in samples:
        if sample.set_name not in {SAFE, UNSAFE}:
            raise DataError(
                f"sample '{sample.id}' is of set '{sample.set_name}', expected '{SAFE}' or "
                f"'{UNSAFE}'. Build the samples with build_single_response, build_multi_response, "
                "build_multi_instruction or build_reminded."
            )
        if sample.id in seen:
            raise DataError(f"two samples have the id '{sample.id}'. Give each its own.")
        seen.add(sample.id)
        sides.setdefault(group_of(sample), set()).add(sample.set_name)
    for name, found in sides.items():
        if len(found) < 2:  # noqa: PLR2004 - safe and unsafe
            raise DataError(
                f"group '{name}' has {found.pop()} samples only. A contrastive group needs both; "
                "its samples share what stands before '#' in their ids."
            )
    return list(samples)


def _respond(
    requests: Sequence[Sample], responses: Callable[[Sample], tuple[Sequence[str], Sequence[str]]]
) -> list[Sample]:
    """Give each request safe and unsafe responses."""
    _check_harm(requests, is_harmful=True)
    samples = []
    for sample in requests:
        for side, texts in zip((SAFE, UNSAFE), responses(sample), strict=True):
            samples += [
                replace(sample, id=f"{sample.id}{_MARK}{side}-{n}", set_name=side, answer=text)
                for n, text in enumerate(texts)
            ]
    return check_groups(samples)


def _check_harm(samples: Sequence[Sample], *, is_harmful: bool) -> None:
    if not samples:
        raise DataError("no requests to build groups from. Pass harmful requests.")
    for sample in samples:
        if sample.is_harmful != is_harmful:
            found, wanted = (
                ("harmful", "harmless") if sample.is_harmful else ("harmless", "harmful")
            )
            raise DataError(
                f"sample '{sample.id}' is marked {found}, but a {wanted} request is needed here. "
                "Set its is_harmful, or leave it out."
            )


def _read_vlguard_item(item: Mapping[str, Any], folder: Path) -> list[Sample]:
    samples = []
    for number, turn in enumerate(item["instr-resp"]):
        names = ("unsafe_instruction", "instruction", "safe_instruction")
        key = next((name for name in names if name in turn), "instruction")
        is_harmful = key == "unsafe_instruction" or (key == "instruction" and not item["safe"])
        samples.append(
            Sample(
                id=f"{item['id']}-{number}",
                prompt=turn[key],
                images=(folder / item["image"],),
                answer=turn.get("response"),
                category=item.get("harmful_category") or "",
                is_harmful=is_harmful,
            )
        )
    return samples
