import json
import subprocess
import sys
from pathlib import Path

import pytest

from safebridge.cli.main import main

SIZES = {
    "--harmful-samples": "6",
    "--benign-samples": "6",
    "--max-new-tokens": "2",
    "--layer-samples": "0",
    "--shown-samples": "2",
}


def test_the_diagnosis_runs_on_the_shipped_twins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    sizes = [word for pair in SIZES.items() for word in pair]
    assert main(["diagnose", "tiny/llava", "--out", str(out), "--fast", *sizes]) == 0
    printed = capsys.readouterr().out
    assert "whether: The model refuses few harmful requests even in words" in printed
    assert f"report: {out / 'report.html'}" in printed
    summary = json.loads((out / "diagnosis.json").read_text())
    assert summary["command"].startswith(f"safebridge diagnose tiny/llava --out {out} --fast")
    assert "--layer-samples 0" in summary["command"]
    assert summary["config"]["split"] == "validation"
    assert summary["curves"] == []
    assert "did not look into the layers" in (out / "report.html").read_text()


def test_a_bad_size_is_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["diagnose", "tiny/llava", "--out", str(tmp_path), "--harmful-samples", "0"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--harmful-samples must be above 0, found 0" in error


def test_the_help_of_both_commands_needs_no_torch() -> None:
    code = (
        "import sys\nfrom safebridge.cli.main import main\n"
        "for name in ('diagnose', 'compare'):\n"
        "    try:\n        main([name, '--help'])\n    except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'scipy', 'numpy', 'PIL'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)\n"
    )
    done = subprocess.run(  # noqa: S603 - our own code
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--harmful-samples" in done.stdout
    assert "--out FILE" in done.stdout
