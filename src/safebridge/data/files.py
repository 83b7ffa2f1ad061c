"""Samples on disk: JSON lines, written and read."""

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from safebridge.data.sample import Sample
from safebridge.errors import DataError

__all__ = ["load_samples", "save_samples"]


def save_samples(samples: Sequence[Sample], path: Path | str) -> Path:
    """Write samples as JSON lines, with picture paths relative to the file where possible.

    Args:
        samples: What to write.
        path: The file; its folder must exist.
    """
    path = Path(path)
    folder = path.parent.resolve()
    lines = []
    for sample in samples:
        images = [image.resolve() for image in sample.images]
        record = asdict(sample) | {
            "images": [
                str(image.relative_to(folder) if image.is_relative_to(folder) else image)
                for image in images
            ]
        }
        lines.append(json.dumps(record, ensure_ascii=False))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def load_samples(path: Path | str) -> list[Sample]:
    """Read samples from JSON lines.

    Args:
        path: A file as `save_samples` writes it; picture paths are taken from its folder.

    Raises:
        DataError: If the file cannot be read, or a line is no sample; the message names it.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read samples from {path}: {error}.") from error
    known = {field.name for field in fields(Sample)}
    samples = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            record["images"] = tuple(path.parent / image for image in record.get("images", ()))
            samples.append(Sample(**record))
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}, line {number} is no sample ({error}). A line is a JSON object with "
                f"id, prompt and any of {', '.join(sorted(known - {'id', 'prompt'}))}."
            ) from error
    return samples
