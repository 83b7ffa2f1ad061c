from pathlib import Path

import pytest
from PIL import Image

from safebridge.cli.main import main


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.new("RGB", (40, 40), "red").save(path)
    return path


def test_the_base_answer_is_printed(picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["ask", "tiny/llava", "--prompt", "What is this?", "--image", str(picture)]
    assert main([*words, "--max-new-tokens", "3"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("base (answered): ")
    assert out.count("\n") == 1


def test_a_request_needs_no_picture(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ask", "tiny/llava", "--prompt", "Hello?", "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out.startswith("base ")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), (b"no picture", "is not a picture"), ("half", "damaged or truncated")],
)
def test_a_bad_picture_is_one_line_and_status_2(
    content: bytes | str | None,
    message: str,
    picture: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = picture.read_bytes()
    picture.unlink()
    if content is not None:
        picture.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    assert main(["ask", "tiny/llava", "--prompt", "What?", "--image", str(picture)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", " "], "--prompt is empty"),
        (["--prompt", "What?", "--max-new-tokens", "0"], "--max-new-tokens must be 1 or more"),
        (["--prompt", "What?", "--defense", "/nowhere"], "Give a folder written by save()"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ask", "tiny/llava", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
