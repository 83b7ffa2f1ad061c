"""`safebridge fit METHOD`: learn a defense and save it; each method is a module of its own."""

import argparse
import sys
from pathlib import Path
from typing import Any

from safebridge.cli import (
    fit_activation_revision,
    fit_security_tensors,
    fit_text_guided_alignment,
)

__all__ = ["add_parser"]

METHODS = (fit_security_tensors, fit_activation_revision, fit_text_guided_alignment)
"""One module for each method: `NAME`, `HELP`, `add_options(parser)` and `fit(arguments)`, which
saves the defense and returns the lines to print."""


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to the parser.

    Args:
        commands: What `ArgumentParser.add_subparsers` returned.
        common: Parser with the options that every command has.
    """
    parser = commands.add_parser(
        "fit",
        help="learn a defense on a model and save it",
        description="Learn a defense from samples and save it as an artifact folder. The model's "
        "weights are never changed.",
    )
    methods = parser.add_subparsers(
        dest="method", metavar="METHOD", title="methods", help="which defense", required=True
    )
    for module in METHODS:
        own = methods.add_parser(
            module.NAME, parents=[common], help=module.HELP, description=module.HELP
        )
        own.add_argument(
            "--model",
            required=True,
            metavar="MODEL",
            help="hub name, local folder, safebridge/mini or tiny/<family>",
        )
        own.add_argument(
            "--data", type=Path, required=True, metavar="FILE", help="what to learn from"
        )
        own.add_argument(
            "--out", type=Path, required=True, metavar="FOLDER", help="where the artifact goes"
        )
        own.add_argument(
            "--config",
            type=Path,
            metavar="FILE",
            help="settings as a JSON object; options given here as well take precedence",
        )
        module.add_options(own)
        own.set_defaults(run=run, fit=module.fit)


def run(arguments: argparse.Namespace) -> int:
    """Fit one method and print where its artifact is.

    Args:
        arguments: As parsed by the options of `add_parser`.
    """
    lines = arguments.fit(arguments)
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return 0
