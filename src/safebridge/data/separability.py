"""How well two sets of samples are told apart by what should not tell: wording, picture quality."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from PIL import Image

from safebridge.data.sample import Sample, open_image
from safebridge.errors import DataError

__all__ = [
    "STATISTICS",
    "Separability",
    "measure_image_separability",
    "measure_image_statistics",
    "measure_request_separability",
    "measure_separability",
    "measure_text_separability",
]

STATISTICS: Final = (
    "log width",
    "log height",
    "mean red",
    "mean green",
    "mean blue",
    "contrast",
    "saturation",
    "sharpness",
    "share of edges",
    "share of near-white",
    "share of near-black",
    "entropy of brightness",
    "log number of colours",
)
"""What `measure_image_statistics` returns, in its order; none of it says what is shown."""

_FOLDS: Final = 10
_RIDGE: Final = 1.0
_EXTREME: Final = 16  # of 255, from white or black
_EDGE: Final = 24.0  # of 255, between neighbours
_COLOUR_SHIFT: Final = 4  # bits dropped before colours are counted


@final
@dataclass(frozen=True)
class Separability:
    """How often a rule that must not know better than chance tells SA from TCB; half is chance."""

    request_accuracy: float
    """Of the best rule that knows each request string's share of the two sets. It is not
    cross-validated: an upper bound for any reader of the request."""

    words_accuracy: float
    """Of naive Bayes over words, each request string judged by all others. The authors' data
    reach 0.93 in this way."""

    image_accuracy: float | None
    """Of a linear rule over sizes, colours and sharpness and their squares, pictures judged by
    rules that were fitted without them; None without pictures."""

    image_chance_95: float | None
    """Where accuracies of pictures that differ in nothing stay in 95 % of cases, from the
    number of distinct pictures; None without pictures."""


def measure_separability(first: Sequence[Sample], second: Sequence[Sample]) -> Separability:
    """Measure what tells two sets apart besides what the pictures show.

    Args:
        first: Samples of one set, e.g. SA.
        second: Samples of the other, e.g. TCB.

    Raises:
        DataError: If a set is empty or a picture cannot be opened.
    """
    if not first or not second:
        raise DataError(
            f"two sets are needed, found {len(first)} and {len(second)} samples. Give both."
        )
    prompts = [[sample.prompt for sample in part] for part in (first, second)]
    groups = [sorted({path for s in part for path in s.images}) for part in (first, second)]
    image_accuracy = image_chance = None
    if all(groups):
        image_accuracy = measure_image_separability(*groups)
        # Balanced accuracy of coin flips: a mean of two independent shares.
        spread = math.sqrt(sum(0.25 / len(group) for group in groups)) / 2
        image_chance = min(1.0, 0.5 + 1.645 * spread)
    return Separability(
        request_accuracy=measure_request_separability(*prompts),
        words_accuracy=measure_text_separability(*prompts),
        image_accuracy=image_accuracy,
        image_chance_95=image_chance,
    )


def measure_request_separability(first: Sequence[str], second: Sequence[str]) -> float:
    """Score the best rule that knows each request string's share of two sets.

    Args:
        first: Requests of one set, repeated as often as they occur.
        second: Requests of the other.

    Returns:
        Balanced accuracy in [0, 1], on the very requests that the rule knows.
    """
    shares: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for side, requests in enumerate((first, second)):
        for request in requests:
            shares[request][side] += 0.5 / len(requests)
    return sum(max(pair) for pair in shares.values())


def measure_text_separability(first: Sequence[str], second: Sequence[str]) -> float:
    """Measure how well word counts tell two sets of requests apart.

    Multinomial naive Bayes with add-one smoothing and equal priors. Every distinct request
    is judged by a classifier that never saw it, so that the same strings in both sets
    give one half.

    Args:
        first: Requests of one set, repeated as often as they occur.
        second: Requests of the other.

    Returns:
        Balanced accuracy in [0, 1]; a tie counts half.

    Source:
        Leave-one-template-out, as measured on the data of Li et al. 2025 (arXiv:2507.20994).
    """
    counts = [Counter(first), Counter(second)]
    words = {text: Counter(_words(text)) for text in counts[0] | counts[1]}
    totals: list[Counter[str]] = [Counter(), Counter()]
    for total, count in zip(totals, counts, strict=True):
        for text, times in count.items():
            for word, number in words[text].items():
                total[word] += number * times
    vocabulary, hits = len(totals[0] | totals[1]), [0.0, 0.0]
    for text, own_words in words.items():
        scores = []
        for total, count in zip(totals, counts, strict=True):
            own = {word: number * count[text] for word, number in own_words.items()}
            rest = total.total() - sum(own.values()) + vocabulary
            scores.append(
                sum(
                    number * math.log((total[word] - own[word] + 1) / rest)
                    for word, number in own_words.items()
                )
            )
        for side, sign in ((0, 1), (1, -1)):
            hits[side] += counts[side][text] * _share(sign * (scores[0] - scores[1]))
    return (hits[0] / len(first) + hits[1] / len(second)) / 2


def measure_image_separability(
    first: Sequence[Path], second: Sequence[Path], *, seed: int = 0
) -> float:
    """Measure how well low-level statistics tell two sets of pictures apart.

    Ridge regression on standardised statistics and their squares, cross-validated over
    pictures; both sets weigh the same.

    Args:
        first: Distinct pictures of one set.
        second: Distinct pictures of the other.
        seed: Seed of the folds.

    Returns:
        Balanced accuracy in [0, 1].

    Raises:
        DataError: If a set has fewer than two pictures or one cannot be opened.
    """
    if min(len(first), len(second)) < 2:  # noqa: PLR2004 - one to fit on, one to judge
        raise DataError(
            f"image statistics need two pictures of each set, found {len(first)} and "
            f"{len(second)}. Give more pictures."
        )
    rows = np.stack([measure_image_statistics(open_image(path)) for path in [*first, *second]])
    sides = np.array([1.0] * len(first) + [-1.0] * len(second))
    features = _standardised(np.concatenate([rows, _standardised(rows) ** 2], axis=1))
    generator = np.random.default_rng(seed)
    folds = np.empty(len(sides), dtype=int)
    for side in (1.0, -1.0):  # every fold has both
        members = np.flatnonzero(sides == side)
        folds[generator.permutation(members)] = np.arange(len(members)) % _FOLDS
    found = np.zeros(len(sides))
    for fold in np.unique(folds):
        found[folds == fold] = _ridge(features[folds != fold], sides[folds != fold])(
            features[folds == fold]
        )
    hits = np.array([_share(score * side) for score, side in zip(found, sides, strict=True)])
    return float((hits[sides > 0].mean() + hits[sides < 0].mean()) / 2)


def measure_image_statistics(image: Image.Image) -> Float[ndarray, " statistics"]:
    """Measure `STATISTICS` of one picture: size, colours, contrast and sharpness.

    Args:
        image: An RGB picture; not changed.
    """
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    grey = pixels.mean(axis=2)
    spread = pixels.max(axis=2) - pixels.min(axis=2)
    steps = np.concatenate([np.abs(np.diff(grey, axis=axis)).ravel() for axis in (0, 1)])
    levels = np.bincount(grey.astype(int).ravel(), minlength=256) / grey.size
    present = levels[levels > 0]
    coarse = pixels.astype(np.uint8).reshape(-1, 3) >> _COLOUR_SHIFT
    return np.array(
        [
            math.log(image.width),
            math.log(image.height),
            *pixels.mean(axis=(0, 1)),
            grey.std(),
            spread.mean(),
            steps.std() if steps.size else 0.0,
            (steps > _EDGE).mean() if steps.size else 0.0,
            (grey > 255 - _EXTREME).mean(),
            (grey < _EXTREME).mean(),
            -(present * np.log(present)).sum(),
            math.log(len(np.unique(coarse, axis=0))),
        ]
    )


def _words(text: str) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()


def _share(margin: float) -> float:
    """Return 1 for a hit, 0 for a miss and one half for a tie."""
    return 0.5 if abs(margin) < 1e-9 else float(margin > 0)  # noqa: PLR2004 - rounding


def _standardised(rows: Any) -> Any:
    spread = rows.std(axis=0)
    return (rows - rows.mean(axis=0)) / np.where(spread > 0, spread, 1.0)


def _ridge(features: Any, sides: Any) -> Any:
    """Fit a ridge rule in which both sides weigh the same; it returns scores."""
    weights = np.where(sides > 0, 0.5 / (sides > 0).sum(), 0.5 / (sides < 0).sum())
    design = np.concatenate([features, np.ones((len(features), 1))], axis=1)
    penalty = np.eye(design.shape[1]) * _RIDGE / len(features)
    penalty[-1, -1] = 0.0  # the offset is free
    weighted = design * weights[:, None]
    beta = np.linalg.solve(weighted.T @ design + penalty, weighted.T @ sides)
    return lambda rows: np.concatenate([rows, np.ones((len(rows), 1))], axis=1) @ beta
