"""Every number of a diagnosis on disk, as JSON and as Parquet."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safebridge.diagnosis.results import Record, SiteFigure
from safebridge.errors import DataError
from safebridge.optional import require

__all__ = ["list_site_records", "read_json", "write_json", "write_records"]

_COLUMNS = (
    "variant", "setting", "metric", "split", "category", "layer", "head", "value", "low", "high",
    "n", "p_value", "p_adjusted", "seeds",
)  # fmt: skip


def write_records(records: Sequence[Record], folder: Path) -> None:
    """Write `numbers.json` and `numbers.parquet`, one row for each number.

    Args:
        records: The numbers.
        folder: Where to.

    Raises:
        MissingExtraError: If pyarrow is not installed.
    """
    pyarrow = require("pyarrow", extra="reports")
    parquet = require("pyarrow.parquet", extra="reports")
    write_json(folder / "numbers.json", [record.to_json() for record in records])
    rows = [
        {**{name: getattr(record, name) for name in _COLUMNS}, "seeds": list(record.seeds)}
        for record in records
    ]
    kinds = {
        **dict.fromkeys(("variant", "setting", "metric", "split", "category"), pyarrow.string()),
        **dict.fromkeys(("layer", "head", "n"), pyarrow.int64()),
        "seeds": pyarrow.list_(pyarrow.int64()),
    }
    schema = pyarrow.schema(
        [(name, kinds.get(name, pyarrow.float64())) for name in _COLUMNS],
        metadata={"about": "one number of a diagnosis in each row"},
    )
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema), folder / "numbers.parquet")


def list_site_records(
    figures: Sequence[SiteFigure], *, split: str, seeds: Sequence[int]
) -> list[Record]:
    """Return every cell of every map as a record.

    Args:
        figures: The maps.
        split: The part of the data.
        seeds: The seeds of the run.
    """
    return [
        Record(
            "base", name, figure.key, split, value, value, value, figure.n, tuple(seeds),
            layer=layer, head=head,
        )
        for figure in figures
        for name, rows in figure.maps.items()
        for layer, row in zip(figure.layers, rows, strict=True)
        for head, value in enumerate(row)
    ]  # fmt: skip


def write_json(path: Path, content: Any) -> None:
    """Write JSON for people and machines; what is not finite is an error.

    Args:
        path: The file.
        content: JSON values.
    """
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read what `write_json` wrote.

    Args:
        path: The file.

    Raises:
        DataError: If it is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot read {path}: {error}. Give a folder that `safebridge diagnose` wrote."
        ) from error
