"""Samples in LLaVA's JSON, with `image_caption` and `retrieved_caption`; read when needed."""

import json
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Final, Literal, final, overload

from safebridge.data.sample import Sample
from safebridge.errors import DataError

__all__ = ["LlavaFile", "write_llava"]

_PLACEHOLDER: Final = "<image>"
_CHUNK: Final = 1 << 22
_GAP: Final = re.compile(r"[\s,]*")
_LIST_GAP: Final = re.compile(r"[\s,\[\]]*")


@final
class LlavaFile(Sequence[Sample]):
    """A LLaVA training file as a sequence of samples, of which only the places are in memory.

    The file is one JSON list, as LLaVA's are, or one JSON object per line. It is read
    through once when it is opened, in pieces, and a sample is parsed when it is asked for;
    so hundreds of thousands of samples cost a few megabytes.

    A record has `id`, `conversations` and, if it has a picture, `image` (a name or a list);
    `image_caption` and `retrieved_caption` become `Sample.caption` and `Sample.retrieved`.
    `<image>` is taken out of the request, because the model's own template writes it.

    Args:
        path: The file.
        image_folder: Where the pictures are; None takes the file's folder.
        turns: "first" makes a sample of each conversation's first request and answer; "all"
            one of every request and answer, each without those before it.
        text_only_mark: Records whose id contains this lose their picture. In the authors'
            files "tox" marks texts that name a picture only for the loader's sake.

    Raises:
        DataError: If the file cannot be read or is no such list.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        image_folder: Path | str | None = None,
        turns: Literal["first", "all"] = "first",
        text_only_mark: str = "",
    ) -> None:
        self.path = Path(path)
        self.image_folder = Path(image_folder) if image_folder is not None else self.path.parent
        self.turns, self.text_only_mark = turns, text_only_mark
        self._starts, self._lengths, self._turns = array("Q"), array("L"), array("L")
        try:
            with self.path.open(encoding="utf-8", newline="") as file:
                for start, length, record in _scan(file, self.path):
                    self._add(start, length, record)
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read samples from {self.path}: {error}.") from error

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...

    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        """Parse one sample, or the samples of a slice."""
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        with self.path.open("rb") as file:
            file.seek(self._starts[index])
            record = json.loads(file.read(self._lengths[index]))
        return self._sample(record, self._turns[index])

    def _add(self, start: int, length: int, record: Any) -> None:
        number = len(self._starts)
        pairs = _count_pairs(record, f"{self.path}, sample {number}")
        for turn in range(pairs if self.turns == "all" else min(1, pairs)):
            self._starts.append(start)
            self._lengths.append(length)
            self._turns.append(turn)

    def _sample(self, record: dict[str, Any], turn: int) -> Sample:
        name = str(record["id"])
        request, answer = record["conversations"][2 * turn : 2 * turn + 2]
        pictures = record.get("image") or []
        pictures = [pictures] if isinstance(pictures, str) else pictures
        if self.text_only_mark and self.text_only_mark in name:
            pictures = []
        return Sample(
            id=f"{name}/{turn}" if self.turns == "all" else name,
            prompt=request["value"].replace(_PLACEHOLDER, "").strip(),
            images=tuple(self.image_folder / picture for picture in pictures),
            answer=answer["value"],
            caption=record.get("image_caption") or "",
            retrieved=record.get("retrieved_caption") or "",
        )


def write_llava(
    samples: Iterable[Sample], path: Path | str, *, image_folder: Path | str | None = None
) -> Path:
    """Write samples as LLaVA's JSON list, one by one as they come.

    Args:
        samples: What to write; an iterator is never held in memory as a whole.
        path: The file; what was there is replaced when all is written.
        image_folder: Folder that picture names are written relative to; None takes the
            file's folder. A picture elsewhere keeps its whole path.

    Returns:
        The file.

    Raises:
        DataError: If the file cannot be written.
    """
    path = Path(path)
    folder = (Path(image_folder) if image_folder is not None else path.parent).resolve()
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            separator = "[\n"
            for sample in samples:
                file.write(separator + json.dumps(_record(sample, folder), ensure_ascii=False))
                separator = ",\n"
            file.write("[]\n" if separator == "[\n" else "\n]\n")
        temporary.replace(path)
    except OSError as error:
        raise DataError(
            f"cannot write samples to {path}: {error}. Choose a folder that you may write to."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _record(sample: Sample, folder: Path) -> dict[str, Any]:
    placeholders = f"{_PLACEHOLDER}\n" * len(sample.images)
    record: dict[str, Any] = {
        "id": sample.id,
        "conversations": [
            {"from": "human", "value": placeholders + sample.prompt},
            {"from": "gpt", "value": sample.answer or ""},
        ],
        "image_caption": sample.caption,
        "retrieved_caption": sample.retrieved,
    }
    names = [_relative(image, folder) for image in sample.images]
    if names:
        record["image"] = names[0] if len(names) == 1 else names
    return record


def _relative(image: Path, folder: Path) -> str:
    full = image.resolve()
    return str(full.relative_to(folder) if full.is_relative_to(folder) else full)


def _count_pairs(record: Any, place: str) -> int:
    """Return the number of requests with an answer, refusing what is no conversation."""
    expected = 'an object with "id" and "conversations", a list of {"from", "value"}'
    if not isinstance(record, dict) or "id" not in record:
        raise DataError(f"{place} is no LLaVA record. Expected {expected}.")
    turns = record.get("conversations")
    if not isinstance(turns, list) or not all(
        isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in turns
    ):
        raise DataError(f"{place} (id '{record['id']}') has no conversations. Expected {expected}.")
    return len(turns) // 2


def _scan(file: IO[str], path: Path) -> Iterator[tuple[int, int, Any]]:
    """Yield byte offset, length in bytes and value of each record, reading in pieces."""
    decoder = json.JSONDecoder()
    text, place, offset, number = file.read(_CHUNK), 0, 0, 0
    # Brackets stand around a list only; a record itself begins with a brace.
    gap = _LIST_GAP if _GAP.sub("", text, count=1).startswith("[") else _GAP
    while True:
        skipped = gap.match(text, place)
        start = skipped.end() if skipped else place
        offset += len(text[place:start].encode())
        place = start
        try:
            value, end = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            more = file.read(_CHUNK)
            if not more and place < len(text):
                raise DataError(
                    f"{path}, record {number} is no JSON ({error.msg}). Write one JSON list, or "
                    "one object per line."
                ) from error
            if not more:
                return
            text, place = text[place:] + more, 0
            continue
        length = len(text[place:end].encode())
        yield offset, length, value
        offset, place, number = offset + length, end, number + 1
