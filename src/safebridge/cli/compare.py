"""`safebridge compare A B`: two diagnoses side by side in one page."""

import argparse
import sys
from pathlib import Path
from typing import Any

__all__ = ["add_parser"]


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to the parser.

    Args:
        commands: What `ArgumentParser.add_subparsers` returned.
        common: Parser with the options that every command has.
    """
    parser = commands.add_parser(
        "compare",
        parents=[common],
        help="lay two diagnoses side by side",
        description="Compare two folders that `safebridge diagnose` wrote: verdicts, rates, their "
        "differences over the requests that both asked, and curves. Writes one HTML page and its "
        "numbers as JSON beside it.",
    )
    parser.add_argument("first", type=Path, metavar="A", help="folder of the first diagnosis")
    parser.add_argument("second", type=Path, metavar="B", help="folder of the second diagnosis")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("compare.html"),
        metavar="FILE",
        help="the page to write. Default: %(default)s.",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the comparison and print the differences that stand out.

    Args:
        arguments: As parsed by the options of `add_parser`.
    """
    from safebridge.diagnosis.compare import compare_runs  # noqa: PLC0415 - scipy takes a second

    record = compare_runs(arguments.first, arguments.second, arguments.out)
    for one in record["changes"]:
        change = one["change"]
        if change is not None and (change["low"] > 0 or change["high"] < 0):
            sys.stdout.write(
                f"{one['metric']} ({one['setting']}): {100 * change['value']:+.1f} points "
                f"[{100 * change['low']:+.1f}, {100 * change['high']:+.1f}], n = {change['n']}\n"
            )
    sys.stdout.write(f"page: {arguments.out}\nnumbers: {arguments.out.with_suffix('.json')}\n")
    return 0
