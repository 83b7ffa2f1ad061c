"""The `safebridge` command: finds the subcommand, runs it, turns errors into one line."""

import argparse
import errno
import os
import sys
from collections.abc import Sequence

from safebridge import __version__
from safebridge.cli import ask, compare, data, demo, diagnose, fit, info
from safebridge.errors import SafebridgeError

__all__ = ["build_parser", "main"]

EXIT_OK = 0
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

COMMANDS = (demo, diagnose, compare, info, ask, data, fit)

# What the user's disk or path is to blame for; any other OSError is a fault of ours.
_DISK_ERRORS = {
    errno.EACCES: "check the permissions, or choose another folder",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EEXIST: "choose another name",
    errno.EISDIR: "a file is needed there, not a folder",
    errno.ELOOP: "its symbolic links go round in a circle",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOENT: "check the path",
    errno.ENOSPC: "free some space, or choose a folder on another disk",
    errno.ENOTDIR: "a folder is needed there, not a file",
    errno.EPERM: "check the permissions, or choose another folder",
    errno.EROFS: "choose a folder that can be written",
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line; builds no model and imports no torch."""
    parser = argparse.ArgumentParser(
        prog="safebridge",
        description="Diagnose and close the gap between text safety and image safety in "
        "large vision-language models.",
        epilog="`safebridge demo --out demo-results` shows the whole thing in one go.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--debug", action="store_true", help="show the full traceback when something fails"
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for module in COMMANDS:
        module.add_parser(commands, common)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    Args:
        argv: The words after `safebridge`; None takes them from the process.

    Returns:
        0 if all went well, 2 if the input or the disk is at fault, 130 on Ctrl-C.
    """
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.version:
        sys.stdout.write(f"safebridge {__version__}\n")
        return EXIT_OK
    if arguments.command is None:
        parser.print_help()
        return EXIT_OK
    try:
        status = int(arguments.run(arguments))
        sys.stdout.flush()
    except KeyboardInterrupt:
        status = _fail("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:  # `| head` has seen enough
        _discard_unwritten_output()
        status = EXIT_OK
    except SafebridgeError as error:
        if arguments.debug:
            raise
        status = _fail(f"{type(error).__name__}: {error}", EXIT_USER_ERROR)
    except OSError as error:
        if arguments.debug or error.errno not in _DISK_ERRORS:
            raise
        status = _fail(_describe_disk_error(error), EXIT_USER_ERROR)
    return status


def _describe_disk_error(error: OSError) -> str:
    place = f" {error.filename}" if error.filename else ""
    reason = (error.strerror or str(error)).lower()
    return f"cannot use{place or ' a file'}: {reason}; {_DISK_ERRORS[error.errno or 0]}"


def _fail(message: str, status: int) -> int:
    _discard_unwritten_output()
    line = " ".join(message.split())
    sys.stderr.write(f"safebridge: {line}\n")
    return status


def _discard_unwritten_output() -> None:
    """Keep the interpreter from failing again on output that could not be written."""
    try:
        sys.stdout.flush()
    except OSError:
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, sys.stdout.fileno())
        os.close(sink)
