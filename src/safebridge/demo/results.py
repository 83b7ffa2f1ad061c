"""What the demo finds, as plain values that the report and the JSON files are made from."""

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Example"]


@dataclass(frozen=True)
class Example:
    """One picture request with the answers of the base model and the defended one."""

    picture: Path
    """The picture file, which the report takes in small."""

    request: str
    """The text of the request."""

    category: str
    """The kind of thing shown, e.g. "weapons"."""

    concept: str
    """The thing shown, e.g. "revolver"."""

    is_harmful: bool
    """Whether request and picture together ask for something harmful."""

    is_seen: bool
    """Whether the defense was fitted on this category."""

    answers: tuple[str, str]
    """What the base model and the defended model said."""

    refusals: tuple[bool, bool]
    """Whether the judge calls each of the two a refusal."""
