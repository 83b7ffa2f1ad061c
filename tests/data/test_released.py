import json
from pathlib import Path
from typing import Any

import pytest

from safebridge.data.released import read_released_triad
from safebridge.errors import DataError

RECORD = {
    "pic_path": "sa/1.png",
    "input": "How is this used?",
    "output": "Like that.",
    "output_refuse": "I cannot help.",
    "type": "SA set",
}


def write(folder: Path, *records: Any) -> Path:
    path = folder / "data.json"
    path.write_text(json.dumps(list(records)), encoding="utf-8")
    return path


def test_each_type_becomes_its_set_with_its_own_target(tmp_path: Path) -> None:
    records = [RECORD, RECORD | {"type": "TCB set"}, RECORD | {"type": "GB set"}]
    samples = read_released_triad(write(tmp_path, *records))
    assert [(s.set_name, s.answer, s.is_harmful) for s in samples] == [
        ("SA", "I cannot help.", True),
        ("TCB", "Like that.", False),
        ("GB", "Like that.", False),
    ]
    assert samples[0].images == (tmp_path / "sa/1.png",)
    assert len({sample.id for sample in samples}) == 3
    moved = read_released_triad(tmp_path / "data.json", pictures=tmp_path / "else")
    assert moved[0].images == (tmp_path / "else/sa/1.png",)


@pytest.mark.parametrize("kind", ["Harmful", "Harmless", "SA", "sa set", ""])
def test_unknown_types_are_refused(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, RECORD, RECORD | {"type": kind})
    with pytest.raises(DataError, match=f"record 1 is of type '{kind}'; known are SA set, TCB set"):
        read_released_triad(path)


@pytest.mark.parametrize("name", list(RECORD))
def test_records_without_a_field_are_refused(tmp_path: Path, name: str) -> None:
    record = {key: value for key, value in RECORD.items() if key != name}
    with pytest.raises(DataError, match=f"record 0 has no text '{name}'"):
        read_released_triad(write(tmp_path, record))


def test_other_files_say_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="record 0 is no JSON object"):
        read_released_triad(write(tmp_path, "x"))
    (tmp_path / "o.json").write_text("{}")
    with pytest.raises(DataError, match="holds no list of records"):
        read_released_triad(tmp_path / "o.json")
    with pytest.raises(DataError, match="Give the authors' JSON file"):
        read_released_triad(tmp_path / "none.json")
