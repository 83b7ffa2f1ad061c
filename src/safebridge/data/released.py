"""The JSON layout of the data that the authors of security tensors released."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from safebridge.data.sample import Sample
from safebridge.errors import DataError

__all__ = ["read_released_triad"]

_SETS: Final = {"SA set": "SA", "TCB set": "TCB", "GB set": "GB"}
_FIELDS: Final = ("pic_path", "input", "output", "output_refuse", "type")


def read_released_triad(path: Path | str, *, pictures: Path | str | None = None) -> list[Sample]:
    """Read a triad in the authors' layout: a JSON list of records.

    Each record has `pic_path`, `input`, `output` (the model's own answer), `output_refuse`
    and `type`. SA samples get `output_refuse` as their answer and the others `output`. An
    unknown type is an error: the authors' own scripts look for a name that their file does not
    use, and so teach the answers where refusals were meant.

    Args:
        path: The JSON file.
        pictures: Folder that `pic_path` starts from; None takes the file's folder.

    Returns:
        Samples in the order of the file. The pictures are not opened.

    Raises:
        DataError: If the file is no such list, or a field or type is missing or unknown.

    Source:
        Li et al. 2025, "Security Tensors as a Cross-Modal Bridge" (arXiv:2507.20994), the data
        files of the official repository.
    """
    path = Path(path)
    folder = path.parent if pictures is None else Path(pictures)
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}. Give the authors' JSON file.") from error
    if not isinstance(records, list):
        raise DataError(
            f"{path} holds no list of records. Give a file in the authors' layout, or the .jsonl "
            "that `safebridge data build triad` writes."
        )
    return [_read(record, number, path, folder) for number, record in enumerate(records)]


def _read(record: Any, number: int, path: Path, folder: Path) -> Sample:
    if not isinstance(record, Mapping):
        raise DataError(f"{path}, record {number} is no JSON object with {', '.join(_FIELDS)}.")
    missing = [name for name in _FIELDS if not isinstance(record.get(name), str)]
    if missing:
        raise DataError(
            f"{path}, record {number} has no text '{missing[0]}'. A record has "
            f"{', '.join(_FIELDS)}."
        )
    if record["type"] not in _SETS:
        raise DataError(
            f"{path}, record {number} is of type '{record['type']}'; known are "
            f"{', '.join(_SETS)}. Correct it; nothing is guessed, because a wrong set teaches the "
            "opposite answer."
        )
    set_name = _SETS[record["type"]]
    is_harmful = set_name == "SA"
    return Sample(
        id=f"{path.stem}-{number:05d}",
        prompt=record["input"],
        images=(folder / record["pic_path"],),
        answer=record["output_refuse" if is_harmful else "output"],
        set_name=set_name,
        template=record["input"],
        is_harmful=is_harmful,
    )
