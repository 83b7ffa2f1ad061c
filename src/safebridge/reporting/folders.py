"""Keeps earlier results safe: work goes to a folder beside the output and moves in at the end."""

import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from safebridge.errors import DataError

__all__ = ["RESULT_NAMES", "check_output_folder", "replaced_folder"]

RESULT_NAMES = frozenset({"artifact", "logs", "report.html", "summary.json", "answers.json"})
"""What the demo writes; a folder that holds anything else is not ours to replace."""


def check_output_folder(out: Path, *, names: Collection[str] = RESULT_NAMES) -> Path:
    """Find out before the long work whether results can be put there.

    Args:
        out: The folder to be written. It may be absent, empty, or an earlier result.
        names: What an earlier result may hold.

    Returns:
        Its absolute path, links followed.

    Raises:
        DataError: If it is a file, a mount point, holds files of another kind, or
            nothing can be written beside it (read-only, no permission, no space).
    """
    out = out.expanduser().resolve()
    if not out.parent.is_dir():
        raise DataError(
            f"cannot write results to {out}: there is no folder {out.parent}. Create it first, "
            "or choose another --out."
        )
    if out.exists() and not out.is_dir():
        raise DataError(f"cannot write results to {out}: it is a file. Choose another --out.")
    if out.is_mount():
        raise DataError(
            f"cannot write results to {out}: it is a mount point and cannot be replaced as a "
            f"whole. Choose a folder inside it, e.g. --out {out / 'results'}."
        )
    if out.is_dir():
        foreign = sorted({path.name for path in out.iterdir()} - set(names))
        if foreign:
            raise DataError(
                f"{out} holds files that are not earlier results ({', '.join(foreign[:3])}"
                f"{', ...' if len(foreign) > 3 else ''}); they would be lost. "  # noqa: PLR2004
                "Choose an empty or new folder for --out."
            )
    try:
        with _folder_beside(out):
            return out
    except OSError as error:
        raise DataError(
            f"cannot write results to {out}: {(error.strerror or str(error)).lower()} in "
            f"{out.parent}. Choose another --out."
        ) from error


@contextmanager
def replaced_folder(out: Path) -> Iterator[Path]:
    """Give a folder to write to that takes the place of `out` if all goes well.

    On an error, Ctrl-C included, the new folder is removed and `out` is as it was.

    Args:
        out: The folder to replace; its parent exists.

    Yields:
        An empty folder beside `out`, on the same disk.
    """
    with _folder_beside(out) as work:
        new = work / "new"
        old = work / "old"
        new.mkdir()
        yield new
        if out.exists():
            out.rename(old)
        try:
            new.rename(out)
        except BaseException:
            if old.exists():
                old.rename(out)
            raise


@contextmanager
def _folder_beside(out: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
