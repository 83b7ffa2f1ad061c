"""The embedded pictures and their text twins as `Sample`s, by kind, split and category."""

import csv
import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Final

from safebridge.data.sample import Sample
from safebridge.data.tables import (
    Concept,
    Request,
    is_seen,
    load_concepts,
    load_general_requests,
    load_requests,
    load_splits,
    names_of,
)
from safebridge.errors import DataError, UnknownNameError

__all__ = ["KINDS", "Picture", "is_seen", "load_pictures", "load_samples", "manifest_sha256",
           "names_of"]  # fmt: skip

KINDS: Final = (
    "harmful_text",
    "harmful_image",
    "benign_text",
    "benign_image",
    "general_text",
    "general",
    "naming",
)
"""Kinds of samples: `harmful_*` and `benign_*` are twins over the same `act` requests;
`general_text` names no object; `general` asks neutral questions about benign pictures;
`naming` asks for the name of any picture."""

_CATEGORIES: Final = ("all", "seen", "unseen")


@dataclass(frozen=True)
class Picture:
    """One shipped drawing."""

    path: Path
    concept: Concept
    style: str
    split: str


@cache
def load_pictures() -> tuple[Picture, ...]:
    """Return the shipped drawings in the order of `manifest.csv`.

    Raises:
        DataError: If a style of the manifest stands in no split.
    """
    folder = _folder()
    split_of = {s: split for split, part in load_splits()["styles"].items() for s in part}
    pictures = []
    for row in csv.DictReader((folder / "manifest.csv").read_text("utf-8").splitlines()):
        if row["style"] not in split_of:
            raise DataError(f"manifest.csv has style '{row['style']}', which splits.json lacks.")
        concept = load_concepts()[row["concept"]]
        path = folder / "pictures" / row["file"]
        pictures.append(Picture(path, concept, row["style"], split_of[row["style"]]))
    return tuple(pictures)


def load_samples(
    kind: str,
    split: str,
    *,
    limit: int | None = None,
    seed: int = 0,
    categories: str = "all",
) -> list[Sample]:
    """Return samples of one kind from one split of styles and templates.

    Pictures come from the split's drawing styles and prompts from its templates, so nothing
    of "test" was in any training. "fit" has more wordings than the embedded model was trained
    on, those of the part "defense". A limit takes as many concepts as possible before any
    concept comes twice.

    Args:
        kind: One of `KINDS`.
        split: "fit", "validation" or "test".
        limit: At most this many samples; None gives all.
        seed: Seed of the choice under a limit.
        categories: "seen" or "unseen" keeps the harmful categories that a defense may,
            or must not, be fitted on; it needs a harmful kind.

    Raises:
        UnknownNameError: If kind, split or categories is not known.
        DataError: If nothing is left.
    """
    for what, name, known in (
        ("kind of samples", kind, KINDS),
        ("split", split, ("fit", "validation", "test")),
        ("group of categories", categories, _CATEGORIES),
    ):
        if name not in known:
            raise UnknownNameError(what, name, known)
    samples = [s for s in _samples(kind, split) if _is_wanted(s, categories)]
    if not samples:
        raise DataError(
            f"no '{kind}' samples in split '{split}' with categories '{categories}'; "
            "'seen' and 'unseen' apply to harmful concepts only."
        )
    return samples if limit is None else _choose(samples, limit, seed)


@cache
def manifest_sha256() -> str:
    """Return the SHA-256 over all tables of the embedded data, pictures by their manifest."""
    digest = hashlib.sha256()
    for path in sorted(_folder().glob("*.*")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _folder() -> Path:
    return Path(str(files("safebridge.data"))) / "mini"


def _is_wanted(sample: Sample, categories: str) -> bool:
    if categories == "all":
        return True
    is_harmful_concept = sample.category != "benign"
    return is_harmful_concept and is_seen(sample.category) == (categories == "seen")


def _requests(split: str, kind: str) -> list[Request]:
    requests, splits = load_requests(), load_splits()["requests"]
    names = splits["fit"] + splits["defense"] if split == "fit" else splits[split]
    return [requests[name] for name in names if requests[name].kind == kind]


@cache
def _samples(kind: str, split: str) -> tuple[Sample, ...]:
    return tuple(_all_samples(kind, split))


def _all_samples(kind: str, split: str) -> Iterator[Sample]:
    if kind == "general_text":
        yield from _general_text(split)
    elif kind.endswith("_text"):
        yield from _texts(split, is_harmful=kind.startswith("harmful"))
    else:
        yield from _pictures(kind, split)


def _general_text(split: str) -> Iterator[Sample]:
    for number, prompt in enumerate(load_general_requests().get(split, ())):
        name = f"general-{split}-{number:02d}"
        yield Sample(id=name, prompt=prompt, category="benign", template=name)


def _texts(split: str, *, is_harmful: bool) -> Iterator[Sample]:
    drawn = {p.concept.name for p in load_pictures() if p.split == split}
    for concept, request in product(load_concepts().values(), _requests(split, "act")):
        if concept.name in drawn and concept.is_harmful == is_harmful:
            yield Sample(
                id=f"{concept.name}/text/{request.name}",
                prompt=request.text.format(concept.phrase),
                concept=concept.name,
                category=concept.category,
                template=request.name,
                is_harmful=is_harmful,
            )


def _pictures(kind: str, split: str) -> Iterator[Sample]:
    of_request = {"general": "neutral", "naming": "naming"}.get(kind, "act")
    for picture, request in product(load_pictures(), _requests(split, of_request)):
        concept = picture.concept
        is_in = kind == "naming" or concept.is_harmful == (kind == "harmful_image")
        if picture.split == split and is_in:
            yield Sample(
                id=f"{picture.path.stem}/{request.name}",
                prompt=request.picture,
                images=(picture.path,),
                concept=concept.name,
                category=concept.category,
                style=picture.style,
                template=request.name,
                is_harmful=kind == "harmful_image",
            )


def _choose(samples: list[Sample], limit: int, seed: int) -> list[Sample]:
    rng = random.Random(seed)
    shuffled = rng.sample(samples, len(samples))
    taken: dict[str, int] = {}
    rounds = []
    for sample in shuffled:
        taken[sample.concept] = taken.get(sample.concept, 0) + 1
        rounds.append(taken[sample.concept])
    order = sorted(range(len(shuffled)), key=lambda i: rounds[i])
    return [shuffled[i] for i in order[:limit]]
