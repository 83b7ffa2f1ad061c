"""A user's own pictures with categories, and the requests that are asked about them."""

import csv
import json
import math
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from PIL import Image

from safebridge.data.sample import Sample, open_image
from safebridge.data.tables import load_requests, load_splits
from safebridge.errors import DataError

__all__ = [
    "AskedPictures",
    "LabelledPicture",
    "ask_about",
    "load_questions",
    "match_resolutions",
    "read_pictures",
    "resize_pictures",
]

_SUFFIXES: Final = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
_COLUMNS: Final = ("image", "category")
_OPTIONAL: Final = ("is_harmful", "concept", "style")
_TRUE, _FALSE = frozenset({"1", "true", "yes"}), frozenset({"0", "false", "no"})


@final
@dataclass(frozen=True)
class LabelledPicture:
    """One picture file and what is known about it."""

    path: Path
    """The file."""

    category: str
    """The kind of thing it shows, e.g. "weapons"."""

    is_harmful: bool
    """Whether a request to make, get or use what it shows is to be refused."""

    concept: str = ""
    """The thing shown, e.g. "revolver"; empty if unknown."""

    style: str = ""
    """The source or drawing style; empty if unknown."""


@final
@dataclass(frozen=True)
class AskedPictures:
    """Samples without answers, ready for `build_triad`."""

    harmful: tuple[Sample, ...]
    """Harmful pictures with requests that do not name the object (SA)."""

    benign: tuple[Sample, ...]
    """Benign pictures of matched resolution with the same requests (TCB)."""

    general: tuple[Sample, ...]
    """Benign pictures with neutral questions (GB)."""


def read_pictures(source: Path | str, harmful: Collection[str] = ()) -> list[LabelledPicture]:
    """Read pictures with categories from a folder or a table.

    In a folder, every sub-folder is a category. A table is a `.csv`, `.tsv` or `.jsonl` file
    with the columns `image` (path, taken from the table's folder) and `category`, and
    optionally `is_harmful` (true or false), `concept` and `style`.

    Args:
        source: The folder or the table.
        harmful: Categories that are harmful, where no `is_harmful` says so.

    Returns:
        The pictures in the order of their names, or of the table's rows.

    Raises:
        DataError: If there are no pictures, a column or value is missing, or a name in
            `harmful` is no category.
    """
    source = Path(source)
    pictures = (
        _read_folder(source, harmful) if source.is_dir() else _read_table(source, set(harmful))
    )
    if not pictures:
        raise DataError(
            f"no pictures in {source}. Give a folder with one sub-folder per category, or a table "
            f"with the columns {', '.join(_COLUMNS)}."
        )
    categories = sorted({picture.category for picture in pictures})
    unknown = sorted(set(harmful) - set(categories))
    if unknown:
        raise DataError(
            f"'{unknown[0]}' is no category of {source}; found {', '.join(categories)}. "
            "Name the harmful ones as they are written there."
        )
    return pictures


def load_questions(kind: str) -> list[str]:
    """Return the embedded requests beside a picture, of the fit split.

    Args:
        kind: "act" (innocuous wording that goes with any object) or "neutral".
    """
    requests = load_requests()
    names = load_splits()["requests"]["fit"]
    return [requests[name].picture for name in names if requests[name].kind == kind]


def ask_about(
    pictures: Sequence[LabelledPicture],
    questions: Sequence[str],
    general_questions: Sequence[str],
    *,
    per_picture: int = 1,
    seed: int = 0,
) -> AskedPictures:
    """Ask the same questions about harmful pictures and about benign ones of like size.

    Every harmful picture gets `per_picture` questions, dealt out evenly. Each of these
    samples has a twin: the same question about the benign picture that was matched to the
    harmful one. General questions go to benign pictures without a match, or to all benign
    ones if none is left over, half as many as there are harmful samples.

    Args:
        pictures: Harmful and benign pictures.
        questions: Requests that name no object.
        general_questions: Neutral questions about any picture.
        per_picture: Questions for each harmful picture.
        seed: Seed of who is asked what.

    Raises:
        DataError: If there are no harmful or no benign pictures, or no questions.
    """
    harmful = [picture for picture in pictures if picture.is_harmful]
    benign = [picture for picture in pictures if not picture.is_harmful]
    if not harmful or not benign:
        raise DataError(
            f"a triad needs harmful and benign pictures, found {len(harmful)} and {len(benign)}. "
            "Name the harmful categories, and add pictures of harmless things."
        )
    if not questions or not general_questions:
        raise DataError("no questions given. Give one request to a line.")
    generator = random.Random(seed)
    twins = match_resolutions(harmful, benign, seed=seed)
    deck = _deal(questions, len(harmful) * per_picture, generator)
    pairs = [pair for pair in zip(harmful, twins, strict=True) for _ in range(per_picture)]
    left = [picture for picture in benign if picture not in set(twins)] or benign
    count = max(1, len(deck) // 2)
    order = generator.sample(left, len(left))
    shown = [order[number % len(order)] for number in range(count)]
    general = _deal(general_questions, count, generator)
    return AskedPictures(
        harmful=tuple(
            _sample(f"sa-{number:05d}", own, question)
            for number, ((own, _), question) in enumerate(zip(pairs, deck, strict=True))
        ),
        benign=tuple(
            _sample(f"tcb-{number:05d}", other, question)
            for number, ((_, other), question) in enumerate(zip(pairs, deck, strict=True))
        ),
        general=tuple(
            _sample(f"gb-{number:05d}", picture, question)
            for number, (picture, question) in enumerate(zip(shown, general, strict=True))
        ),
    )


def match_resolutions(
    first: Sequence[LabelledPicture], second: Sequence[LabelledPicture], *, seed: int = 0
) -> list[LabelledPicture]:
    """Find for each picture one of the other set whose width and height are nearest.

    Greedy, in random order, on the logarithms of width and height; a picture is taken again
    only when all have been taken equally often.

    Args:
        first: Pictures that need a match.
        second: Pictures to choose from.
        seed: Seed of the order.

    Returns:
        One picture of `second` for each of `first`, in their order.

    Raises:
        DataError: If a picture cannot be read or `second` is empty.
    """
    if not second:
        raise DataError("no pictures to match with. Add pictures of harmless things.")
    generator = random.Random(seed)
    sizes = {picture.path: _log_size(picture.path) for picture in (*first, *second)}
    free: list[LabelledPicture] = []
    found: dict[int, LabelledPicture] = {}
    for index in generator.sample(range(len(first)), len(first)):
        if not free:
            free = generator.sample(list(second), len(second))
        size = sizes[first[index].path]
        best = min(range(len(free)), key=lambda i: math.dist(size, sizes[free[i].path]))
        found[index] = free.pop(best)
    return [found[index] for index in range(len(first))]


def resize_pictures(
    pictures: Sequence[LabelledPicture], folder: Path, *, longest_side: int
) -> list[LabelledPicture]:
    """Write every picture as PNG with the same longest side, so that sharpness tells less.

    Args:
        pictures: What to write; the files stay as they are.
        folder: Where to; made if missing.
        longest_side: Pixels of the longer side; give the smallest that occurs, because a
            picture that is enlarged stays blurred.

    Returns:
        The same pictures with their new paths.

    Raises:
        DataError: If a picture cannot be read or the side is not positive.
    """
    if longest_side < 1:
        raise DataError(f"longest_side must be 1 or more, found {longest_side}.")
    folder.mkdir(parents=True, exist_ok=True)
    resized = []
    for number, picture in enumerate(pictures):
        image = open_image(picture.path)
        scale = longest_side / max(image.size)
        width, height = (max(1, round(side * scale)) for side in image.size)
        path = folder / f"{number:05d}-{picture.path.stem}.png"
        image.resize((width, height), Image.Resampling.LANCZOS).save(path)
        resized.append(
            LabelledPicture(
                path, picture.category, picture.is_harmful, picture.concept, picture.style
            )
        )
    return resized


def _read_folder(folder: Path, harmful: Collection[str]) -> list[LabelledPicture]:
    return [
        LabelledPicture(path, sub.name, sub.name in harmful)
        for sub in sorted(folder.iterdir())
        if sub.is_dir()
        for path in sorted(sub.rglob("*"))
        if path.suffix.lower() in _SUFFIXES
    ]


def _read_table(path: Path, harmful: set[str]) -> list[LabelledPicture]:
    pictures = []
    for number, row in _rows(path):
        missing = [name for name in _COLUMNS if not str(row.get(name) or "").strip()]
        if missing:
            raise DataError(
                f"{path}, row {number} has no '{missing[0]}'. Every row needs "
                f"{' and '.join(_COLUMNS)}; {', '.join(_OPTIONAL)} are optional."
            )
        category = str(row["category"]).strip()
        pictures.append(
            LabelledPicture(
                path=path.parent / str(row["image"]).strip(),
                category=category,
                is_harmful=_read_flag(row.get("is_harmful"), category in harmful, path, number),
                concept=str(row.get("concept") or ""),
                style=str(row.get("style") or ""),
            )
        )
    return pictures


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield the rows of a table with their numbers, from 1."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read pictures from {path}: {error}. Give a folder, or a .csv, .tsv or .jsonl "
            "file."
        ) from error
    if path.suffix.lower() != ".jsonl":
        delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        yield from enumerate(csv.DictReader(text.splitlines(), delimiter=delimiter), start=1)
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, row {number} is no JSON ({error}). Correct it.") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {number} is no JSON object. Give image and category.")
        yield number, row


def _read_flag(value: Any, default: bool, path: Path, number: int) -> bool:  # noqa: FBT001
    text = "" if value is None else str(value).strip().lower()
    if text and text not in _TRUE | _FALSE:
        raise DataError(
            f"{path}, row {number}: is_harmful is '{value}'. Write true or false, or leave it out "
            "and name the harmful categories."
        )
    return text in _TRUE if text else default


def _log_size(path: Path) -> tuple[float, float]:
    image = open_image(path)
    return math.log(image.width), math.log(image.height)


def _deal(deck: Sequence[str], count: int, generator: random.Random) -> list[str]:
    """Deal questions out about equally often."""
    dealt: list[str] = []
    while len(dealt) < count:
        dealt += generator.sample(list(deck), len(deck))
    return dealt[:count]


def _sample(name: str, picture: LabelledPicture, question: str) -> Sample:
    is_refused = picture.is_harmful
    return Sample(
        id=name,
        prompt=question,
        images=(picture.path,),
        concept=picture.concept,
        category=picture.category,
        style=picture.style,
        template=question,
        is_harmful=is_refused,
    )
