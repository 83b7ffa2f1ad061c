import argparse
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from safebridge.cli.main import build_parser, main
from safebridge.errors import DataError

COMMAND = [sys.executable, "-m", "safebridge"]


def run_process(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(  # noqa: S603 - our own command
        [*COMMAND, *words], capture_output=True, text=True, check=False, env=environment
    )


def test_help_starts_without_torch_and_lists_the_commands() -> None:
    code = (
        "import sys\nfrom safebridge.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'inspect_ai', 'numpy', 'PIL', 'rich'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)\n"
    )
    done = subprocess.run(  # noqa: S603 - our own code
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for command in ("demo", "info", "ask"):
        assert command in done.stdout


def test_the_help_of_a_command_needs_no_torch_either() -> None:
    code = (
        "import sys\nfrom safebridge.cli.main import main\n"
        "try:\n    main(['demo', '--help'])\nexcept SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)  # noqa: S603
    assert done.returncode == 0


def test_without_a_command_the_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "commands:" in capsys.readouterr().out


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("safebridge 0.")


def test_an_unknown_command_exits_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["dmeo"])
    assert stopped.value.code == 2
    assert "invalid choice: 'dmeo'" in capsys.readouterr().err


def test_an_error_of_ours_is_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--out", str(tmp_path / "nowhere" / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "DataError" in error
    assert "Create it first" in error


def test_debug_shows_the_whole_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Create it first"):
        main(["demo", "--debug", "--out", str(tmp_path / "nowhere" / "out")])


def test_a_place_that_cannot_be_written_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["demo", "--out", "/proc/self/fdinfo/demo"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "fdinfo. Choose another --out" in error


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line_and_status_2() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(  # noqa: S603 - our own command
            [*COMMAND, "info", "tiny/llava"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    assert "no space left on device" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_disk_errors_say_what_to_do(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fail(*_: object, **__: object) -> str:
        raise OSError(number, os.strerror(number), str(tmp_path))

    monkeypatch.setattr("safebridge.cli.demo.check_output_folder", fail)
    assert main(["demo", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path) in error
    assert "choose" in error


def test_other_system_errors_are_not_hidden(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object, **__: object) -> str:
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr("safebridge.cli.demo.check_output_folder", fail)
    with pytest.raises(OSError, match="broken disk"):
        main(["demo", "--out", str(tmp_path / "out")])


def test_ctrl_c_exits_with_status_130(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("safebridge.cli.demo.check_output_folder", interrupt)
    assert main(["demo", "--out", str(tmp_path / "out")]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_info_prints_the_layout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "tiny/llava"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("decoder_layers ") for line in lines)


def test_info_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "tiny/llava", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["family"] == "llava"
    assert facts["num_layers"] > 0


def test_an_unknown_model_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "tiny/lava"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "Did you mean 'llava'?" in error


def test_a_closed_pipe_ends_quietly() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(  # noqa: S603 - our own command
        [*COMMAND, "info", "tiny/llava"],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert "Traceback" not in done.stderr


def test_every_option_of_every_command_has_a_help_text() -> None:
    parser = build_parser()
    commands = next(
        action.choices for action in parser._actions if isinstance(action.choices, dict)
    )
    waiting = list(commands.items())
    while waiting:
        name, command = waiting.pop()
        for action in command._actions:
            assert action.help, f"{name} {action.option_strings}"
            if isinstance(action, argparse._SubParsersAction):
                waiting += [(f"{name} {verb}", own) for verb, own in action.choices.items()]
