import json
from pathlib import Path

import pytest

from safebridge.cli.main import main

SIZES = {
    "--harmful-samples": "3",
    "--benign-samples": "3",
    "--naming-samples": "3",
    "--max-new-tokens": "3",
    "--naming-tokens": "3",
    "--fit-harmful": "4",
    "--fit-twins": "4",
    "--fit-general": "2",
    "--fit-answer-tokens": "3",
    "--virtual-tokens": "2",
    "--epochs": "1",
    "--layer-samples": "3",
}


def test_the_demo_runs_on_the_shipped_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    sizes = [word for pair in SIZES.items() for word in pair]
    assert main(["demo", "--out", str(out), "--model", "tiny/llava", "--fast", *sizes]) == 0
    printed = capsys.readouterr().out
    assert f"report: {out / 'report.html'}" in printed
    summary = json.loads((out / "summary.json").read_text())
    assert summary["command"].startswith(f"safebridge demo --out {out} --model tiny/llava --fast")
    assert "--epochs 1" in summary["command"]
    assert summary["config"]["epochs"] == 1
    assert summary["is_fast"]
    assert summary["command"] in (out / "report.html").read_text()


def test_a_bad_size_is_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--out", str(tmp_path / "out"), "--epochs", "0"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--epochs must be above 0, found 0" in error


def test_an_unknown_model_leaves_earlier_results_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "summary.json").write_text("earlier")
    assert main(["demo", "--out", str(out), "--model", "tiny/nothing"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("safebridge: UnknownNameError")
    assert (out / "summary.json").read_text() == "earlier"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
