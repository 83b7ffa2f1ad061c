"""Captions for pictures: from the model itself, from a file, or from any other captioner."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import final

from safebridge.data.sample import Sample, open_images
from safebridge.errors import DataError
from safebridge.models.generate import generate_answers
from safebridge.models.load import VLM

__all__ = ["Captioner", "FileCaptioner", "ModelCaptioner", "add_captions"]

_AT_ONCE = 256


Captioner = Callable[[Sequence[Sample]], Sequence[str]]
"""Says what the pictures of samples show: one caption for each, in their order."""


@final
class ModelCaptioner:
    """A vision-language model that is asked for a caption; the model to align can be its own.

    Args:
        vlm: The model that looks at the pictures.
        request: What it is asked.
        max_new_tokens: Longest caption in tokens.
        batch_size: Pictures at a time.
        progress: Called after each batch with the number of captions it brought.

    Source:
        Xu et al. 2024 (arXiv:2410.12662) take captions of LLaVA-1.5-13B; their request is
        not known, ours is.
    """

    def __init__(
        self,
        vlm: VLM,
        *,
        request: str = "Describe this picture in one sentence.",
        max_new_tokens: int = 48,
        batch_size: int = 16,
        progress: Callable[[int], object] | None = None,
    ) -> None:
        self.vlm, self.request = vlm, request
        self.max_new_tokens, self.batch_size, self.progress = max_new_tokens, batch_size, progress

    def __call__(self, samples: Sequence[Sample]) -> list[str]:
        """Return greedy captions.

        Args:
            samples: Samples with pictures.
        """
        return generate_answers(
            self.vlm,
            [self.request] * len(samples),
            [open_images(sample) for sample in samples],
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            progress=self.progress,
        )


@final
class FileCaptioner:
    """Captions that are known already, by the picture's path or file name, or the sample's id.

    Args:
        path: A JSON object of names to captions, or JSON lines with `image` and `caption`.

    Raises:
        DataError: If the file cannot be read or is neither.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.captions = _read_captions(self.path)

    def __call__(self, samples: Sequence[Sample]) -> list[str]:
        """Return the captions of samples.

        Args:
            samples: Samples with pictures.

        Raises:
            DataError: If the file has none for one of them.
        """
        return [self._find(sample) for sample in samples]

    def _find(self, sample: Sample) -> str:
        names = [sample.id]
        if sample.images:
            names = [str(sample.images[0]), sample.images[0].name, sample.id]
        for name in names:
            if name in self.captions:
                return self.captions[name]
        raise DataError(
            f"{self.path} has no caption for sample '{sample.id}'. Add one under any of: "
            f"{', '.join(names)}."
        )


def add_captions(samples: Iterable[Sample], captioner: Captioner) -> Iterator[Sample]:
    """Yield samples with captions, a few hundred at a time; nothing else is held in memory.

    Samples that have a caption, or no picture, pass through as they are.

    Args:
        samples: What to caption; not changed.
        captioner: Any captioner.

    Yields:
        The samples in their order.

    Raises:
        DataError: If the captioner returns another number of captions.
    """
    rest = iter(samples)
    while chunk := list(islice(rest, _AT_ONCE)):
        wanted = [sample for sample in chunk if sample.images and not sample.caption]
        captions = list(captioner(wanted)) if wanted else []
        if len(captions) != len(wanted):
            raise DataError(
                f"{len(wanted)} samples got {len(captions)} captions. A captioner must return one "
                "for each, in their order."
            )
        found = dict(zip(map(id, wanted), captions, strict=True))
        for sample in chunk:
            caption = found.get(id(sample))
            yield sample if caption is None else replace(sample, caption=caption)


def _read_captions(path: Path) -> Mapping[str, str]:
    try:
        text = path.read_text(encoding="utf-8")
        try:
            table = json.loads(text)
        except json.JSONDecodeError:
            table = [json.loads(line) for line in text.splitlines() if line.strip()]
        if isinstance(table, dict) and set(table) != {"image", "caption"}:
            return {str(name): str(caption) for name, caption in table.items()}
        rows = [table] if isinstance(table, dict) else table
        return {str(row["image"]): str(row["caption"]) for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"cannot read captions from {path}: {error!r}. Give a JSON object of picture names to "
            'captions, or JSON lines with "image" and "caption".'
        ) from error
