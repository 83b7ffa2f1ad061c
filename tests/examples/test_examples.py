import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_quickstart_runs_on_a_tiny_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", "tiny/llava", "--samples", "8", "--out", str(tmp_path / "artifact")]
    monkeypatch.setattr(sys, "argv", ["quickstart.py", *words])
    runpy.run_path(str(EXAMPLES / "quickstart.py"), run_name="__main__")
    out = capsys.readouterr().out
    for word in ("harmful: ", "harmless: ", "before: ", "after: ", "saved to "):
        assert word in out
    assert (tmp_path / "artifact" / "artifact.json").is_file()
