"""Files that a long benchmark keeps what it found in, so that a run that was stopped goes on."""

import hashlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

__all__ = ["OUTCOMES", "describe_command", "digest", "kept", "write"]

OUTCOMES: Final = Path(__file__).resolve().parent / "outcomes"
"""What was measured on the test split, answer by answer; committed."""


def digest(values: Any) -> str:
    """Return a short name for JSON values.

    Args:
        values: Everything that the content of a file follows from.
    """
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    Args:
        path: The file; its folder exists.
        text: Its content.
    """
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        file.write(text)
    Path(file.name).chmod(0o644)
    Path(file.name).replace(path)


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """Return what a JSON file holds, making it first if it is not there.

    Args:
        path: The file; its folder exists.
        make: Returns JSON values.
    """
    if not path.is_file():
        write(path, json.dumps(make(), separators=(",", ":")))
    return json.loads(path.read_text(encoding="utf-8"))


def describe_command(*, leave_out: tuple[str, ...] = ()) -> str:
    """Return the command that is running, as a user types it.

    Args:
        leave_out: Options to leave out, with the values after them.
    """
    words: list[str] = []
    is_left_out = False
    for word in sys.argv[1:]:
        if word.startswith("--"):
            is_left_out = word in leave_out
        if not is_left_out:
            words.append(word)
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])
