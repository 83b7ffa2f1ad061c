"""The requests of a diagnosis: twins of text and picture, each put in seven ways."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, cast, final

from PIL import Image

from safebridge.analysis.typography import (
    TYPOGRAPHIC_PROMPT,
    render_blank,
    render_noise,
    render_words,
)
from safebridge.data import twins as shipped_twins
from safebridge.data.files import load_samples
from safebridge.data.sample import Sample
from safebridge.data.source import TwinSource
from safebridge.data.tables import Split, load_concepts
from safebridge.diagnosis.config import CONDITIONS, SPELLED, DiagnosisConfig
from safebridge.errors import DataError

__all__ = ["CAPTION_FORMAT", "Case", "Twin", "build_cases", "find_twins", "load_twins"]

CAPTION_FORMAT: Final = "There is a picture of {}. {}"
"""How a caption and the request beside the picture are put together."""


@final
@dataclass(frozen=True)
class Twin:
    """One request in words, and the same request beside a picture."""

    text: Sample
    """The request that names its object."""

    picture: Sample
    """The request that points at its object in a picture; its id is the twin's."""


@final
@dataclass(frozen=True)
class Case:
    """One twin in all the ways it is put."""

    id: str
    """The id of the twin's picture sample."""

    concept: str
    """What it is about; twins about the same thing form a cluster."""

    category: str
    """The kind of thing."""

    is_harmful: bool
    """Whether it should be refused."""

    samples: Mapping[str, Sample]
    """The request by condition, see `safebridge.diagnosis.config.CONDITIONS`."""


def load_twins(
    config: DiagnosisConfig, *, file: Path | None = None, source: TwinSource | None = None
) -> list[Twin]:
    """Choose harmful twins and harmless ones.

    Args:
        config: How many, of which split, and the seed.
        file: The user's own twins, as `save_samples` writes them; None takes the shipped ones.
        source: Where shipped twins come from; None is `safebridge.data.twins`.

    Returns:
        Harmful twins first.

    Raises:
        DataError: If there are no harmful or no harmless twins.
    """
    counts = {True: config.harmful_samples, False: config.benign_samples}
    if file is not None:
        twins = find_twins(load_samples(file))
        rng = random.Random(config.seed)
        twins = rng.sample(twins, len(twins))
        chosen = [
            twin
            for side, count in counts.items()
            for twin in [own for own in twins if own.picture.is_harmful == side][:count]
        ]
    else:
        own_source = source or cast("TwinSource", shipped_twins)
        chosen = [
            twin
            for side, count in counts.items()
            for twin in _load_shipped(own_source, config, count, is_harmful=side)
        ]
    for side, word in ((True, "harmful"), (False, "harmless")):
        if not any(twin.picture.is_harmful == side for twin in chosen):
            where = file if file is not None else f"split '{config.split}'"
            raise DataError(
                f"no {word} twins in {where}. A diagnosis compares harmful requests with harmless "
                "ones, each in words and beside a picture, with the same `concept` and `template`."
            )
    return chosen


def find_twins(samples: Sequence[Sample]) -> list[Twin]:
    """Pair picture requests with the text request of the same concept and template.

    Args:
        samples: Requests with and without pictures, in any order.

    Returns:
        One twin for each picture request that has a text request, in their order.

    Raises:
        DataError: If a sample names no concept, or two text requests share one place.
    """
    texts: dict[tuple[str, str, bool], Sample] = {}
    for sample in samples:
        if not sample.concept:
            raise DataError(
                f"sample '{sample.id}' names no concept. Twins are found by their `concept` and "
                "`template`, so give every sample both."
            )
        if not sample.images and texts.setdefault(_place(sample), sample) is not sample:
            raise DataError(
                f"samples '{texts[_place(sample)].id}' and '{sample.id}' are both the text of "
                f"'{sample.concept}' in template '{sample.template}'. Give each its own template."
            )
    return [
        Twin(texts[_place(sample)], sample)
        for sample in samples
        if sample.images and _place(sample) in texts
    ]


def build_cases(twins: Sequence[Twin], folder: Path, *, seed: int = 0) -> list[Case]:
    """Put every twin in seven ways; pictures that have to be drawn are written to a folder.

    Args:
        twins: The twins.
        folder: Where drawn pictures go; it exists.
        seed: Seed of the noise pictures, each of which is different.

    Raises:
        DataError: If a request cannot be drawn.
    """
    blank = _write(folder, "blank", render_blank())
    cases = []
    for number, twin in enumerate(twins):
        words = _write(folder, f"words-{number:04d}", render_words(twin.text.prompt))
        noise = _write(folder, f"noise-{number:04d}", render_noise(seed=seed + number))
        caption = twin.picture.caption or twin.picture.concept
        base = replace(twin.text, caption=caption, style="")
        made = {
            "text": base,
            "caption": replace(base, prompt=CAPTION_FORMAT.format(caption, twin.picture.prompt)),
            SPELLED: replace(twin.picture, caption=caption),
            "picture": replace(twin.picture, caption=caption),
            "typographic": replace(base, prompt=TYPOGRAPHIC_PROMPT, images=(words,)),
            "blank": replace(base, images=(blank,)),
            "noise": replace(base, images=(noise,)),
        }
        cases.append(
            Case(
                id=twin.picture.id,
                concept=twin.picture.concept,
                category=twin.picture.category,
                is_harmful=twin.picture.is_harmful,
                samples={
                    name: replace(made[name], id=f"{twin.picture.id}#{name}") for name in CONDITIONS
                },
            )
        )
    return cases


def _load_shipped(
    source: TwinSource, config: DiagnosisConfig, count: int, *, is_harmful: bool
) -> list[Twin]:
    kind = "harmful" if is_harmful else "benign"
    split = cast("Split", config.split)
    pictures = source.load_samples(f"{kind}_image", split, limit=count, seed=config.seed)
    texts = source.load_samples(f"{kind}_text", split, seed=config.seed)
    known = load_concepts()
    named = [
        replace(sample, caption=known[sample.concept].phrase)
        if sample.concept in known and not sample.caption
        else sample
        for sample in (*texts, *pictures)
    ]
    return find_twins(named)


def _place(sample: Sample) -> tuple[str, str, bool]:
    return sample.concept, sample.template, sample.is_harmful


def _write(folder: Path, name: str, picture: Image.Image) -> Path:
    path = folder / f"{name}.png"
    picture.save(path)
    return path
