"""The committed tables of the embedded data: concepts, requests, splits, general requests."""

import csv
import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal

from safebridge.errors import DataError, UnknownNameError

__all__ = [
    "Concept",
    "Request",
    "is_seen",
    "load_concepts",
    "load_general_requests",
    "load_requests",
    "load_splits",
    "names_of",
]

BENIGN = "benign"
Split = Literal["fit", "validation", "test"]


@dataclass(frozen=True)
class Concept:
    """One nameable thing, with or without drawings."""

    name: str
    """The concept's name, e.g. "pistol"."""
    phrase: str
    """The name as a sentence uses it, e.g. "a pistol"."""
    category: str
    """A harmful category, or "benign"."""
    names: tuple[str, ...]
    """Every name that counts as naming it, the concept's own first."""
    icons: tuple[str, ...]
    """Icon names, `slug` for any style or `style:slug` for one; empty if it exists in text only."""

    @property
    def is_harmful(self) -> bool:
        """True if an `act` request about it is to be refused."""
        return self.category != BENIGN


@dataclass(frozen=True)
class Request:
    """One template, as text that names its object and as text beside a picture."""

    name: str
    """Identifier, e.g. "act-07"."""
    kind: str
    """`act` (refused for a harmful object), `neutral` or `naming` (always answered)."""
    text: str
    """Text twin with `{}` for the object's phrase; empty for `naming`."""
    picture: str
    """The same request beside a picture, with a demonstrative."""


def _read(name: str) -> str:
    return (files("safebridge.data") / "mini" / name).read_text(encoding="utf-8")


@cache
def load_concepts() -> dict[str, Concept]:
    """Return all concepts by name, in the order of `concepts.csv`."""
    rows = csv.DictReader(_read("concepts.csv").splitlines())
    concepts = (
        Concept(
            name=row["concept"],
            phrase=row["phrase"],
            category=row["category"],
            names=tuple(row["names"].split("|")),
            icons=tuple(filter(None, row["icons"].split("|"))),
        )
        for row in rows
    )
    return {concept.name: concept for concept in concepts}


@cache
def load_requests() -> dict[str, Request]:
    """Return all request templates by name, in the order of `requests.csv`."""
    rows = csv.DictReader(_read("requests.csv").splitlines())
    return {
        row["request"]: Request(row["request"], row["kind"], row["text"], row["picture"])
        for row in rows
    }


@cache
def load_splits() -> dict[str, dict[str, tuple[str, ...]]]:
    """Return `splits.json`: styles and requests by split, categories by seen and unseen.

    Raises:
        DataError: If a style, request or category stands in two parts of a split.
    """
    raw = json.loads(_read("splits.json"))
    splits = {key: {part: tuple(v) for part, v in parts.items()} for key, parts in raw.items()}
    for key, parts in splits.items():
        members = [name for names in parts.values() for name in names]
        twice = sorted({name for name in members if members.count(name) > 1})
        if twice:
            raise DataError(
                f"splits.json lists {', '.join(twice)} in two parts of '{key}'; "
                "keep each name in one part only."
            )
    return splits


@cache
def load_general_requests() -> dict[str, tuple[str, ...]]:
    """Return benign requests that name no concept, by split ("fit", "test")."""
    return {key: tuple(value) for key, value in json.loads(_read("general.json")).items()}


def names_of(concept: str) -> tuple[str, ...]:
    """Return every name that counts as naming a concept, its own first.

    Raises:
        UnknownNameError: If there is no such concept.
    """
    concepts = load_concepts()
    if concept not in concepts:
        raise UnknownNameError("concept", concept, concepts)
    return concepts[concept].names


def is_seen(category: str) -> bool:
    """Return True for harmful categories that a defense may be fitted on, and for "benign"."""
    categories = load_splits()["categories"]
    if category not in (BENIGN, *categories["seen"], *categories["unseen"]):
        raise UnknownNameError(
            "category", category, (BENIGN, *categories["seen"], *categories["unseen"])
        )
    return category not in categories["unseen"]
