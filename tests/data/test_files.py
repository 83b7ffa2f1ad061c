from pathlib import Path

import pytest

from safebridge.data.files import load_samples, save_samples
from safebridge.data.sample import Sample
from safebridge.errors import DataError


def test_paths_beside_the_file_are_written_relative_to_it(tmp_path: Path) -> None:
    near, far = tmp_path / "data" / "a.png", tmp_path / "b.png"
    (tmp_path / "data").mkdir()
    samples = [
        Sample(id="1", prompt="x", images=(near, far), answer="y", set_name="SA", is_harmful=True),
        Sample(id="2", prompt="ä"),
    ]
    path = save_samples(samples, tmp_path / "data" / "s.jsonl")
    assert load_samples(path) == samples
    assert '"a.png"' in path.read_text(encoding="utf-8")
    moved = path.rename(tmp_path / "s.jsonl")
    assert load_samples(moved)[0].images == (tmp_path / "a.png", far)


@pytest.mark.parametrize("line", ['{"id": "1"}', "[]", "{", '{"id": "1", "prompt": "a", "x": 1}'])
def test_a_line_that_is_no_sample_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "s.jsonl").write_text('{"id": "0", "prompt": "a"}\n\n' + line + "\n")
    with pytest.raises(DataError, match=r"line 3 is no sample .*A line is a JSON object"):
        load_samples(tmp_path / "s.jsonl")
