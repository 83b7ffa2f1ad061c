"""`safebridge demo --out DIR`: measure the gap, close it, measure again, show a report."""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from safebridge.cli.fields import add_config_arguments, read_config_arguments
from safebridge.demo.config import DemoConfig, choose_config
from safebridge.reporting.folders import check_output_folder

__all__ = ["add_parser"]


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to the parser.

    Args:
        commands: What `ArgumentParser.add_subparsers` returned.
        common: Parser with the options that every command has.
    """
    parser = commands.add_parser(
        "demo",
        parents=[common],
        help="measure the safety gap of a model, close it, measure again, write a report",
        description="Measure how much more often a model refuses harmful requests in text than "
        "in pictures, fit a security tensor, measure again, and write report.html, summary.json "
        "and the fitted artifact. Earlier results in DIR are replaced only when all went well.",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the results"
    )
    parser.add_argument(
        "--model",
        default="safebridge/mini",
        metavar="MODEL",
        help="hub name, local folder, safebridge/mini or tiny/<family>. Default: %(default)s.",
    )
    parser.add_argument(
        "--fast",
        action="store_true",
        help="few samples and steps: under three minutes, with wide intervals",
    )
    add_config_arguments(parser, DemoConfig, "sizes")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the demo and print where the results are.

    Args:
        arguments: As parsed by the options of `add_parser`.
    """
    given = read_config_arguments(DemoConfig, vars(arguments))
    config = choose_config(is_fast=arguments.fast, given=given)
    out = check_output_folder(arguments.out)

    from safebridge.demo.run import run_demo  # noqa: PLC0415 - torch is slow to import

    run_demo(
        arguments.model,
        out,
        config,
        is_fast=arguments.fast,
        command=_write_command(arguments, given),
    )
    sys.stdout.write(f"report: {out / 'report.html'}\nnumbers: {out / 'summary.json'}\n")
    return 0


def _write_command(arguments: argparse.Namespace, given: dict[str, Any]) -> str:
    """Return the command that does this run again."""
    words = ["safebridge", "demo", "--out", str(arguments.out), "--model", arguments.model]
    words += ["--fast"] if arguments.fast else []
    for name, value in given.items():
        words += ["--" + name.replace("_", "-"), str(value)]
    return shlex.join(words)
