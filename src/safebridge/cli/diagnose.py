"""`safebridge diagnose MODEL --out DIR`: whether, where and why text safety fails on pictures."""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from safebridge.cli.fields import add_config_arguments, read_config_arguments
from safebridge.diagnosis.config import DiagnosisConfig, choose_config

__all__ = ["add_parser"]


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to the parser.

    Args:
        commands: What `ArgumentParser.add_subparsers` returned.
        common: Parser with the options that every command has.
    """
    parser = commands.add_parser(
        "diagnose",
        parents=[common],
        help="show whether, where and why a model's text safety fails on pictures",
        description="Put the same requests in words, beside pictures and in four other ways, "
        "count refusals, look into the decoder's layers, and write report.html with a verdict, "
        "every number as JSON and Parquet, and every figure as PNG and SVG. Earlier results in "
        "DIR are replaced only when all went well.",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="hub name, local folder, safebridge/mini or tiny/<family>"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the results"
    )
    parser.add_argument(
        "--defense",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="a fitted artifact to measure as well; may be given several times",
    )
    parser.add_argument(
        "--allow-other-model",
        action="store_true",
        help="apply defenses although they were fitted on another model",
    )
    parser.add_argument(
        "--twins",
        type=Path,
        metavar="FILE",
        help="your own requests as JSON lines, in words and with pictures, paired by their "
        "`concept` and `template`. Default: the twins that come with Safebridge.",
    )
    parser.add_argument(
        "--fast", action="store_true", help="few requests: about a minute, with wide intervals"
    )
    add_config_arguments(parser, DiagnosisConfig, "sizes")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the diagnosis, print its verdict and where the results are.

    Args:
        arguments: As parsed by the options of `add_parser`.
    """
    given = read_config_arguments(DiagnosisConfig, vars(arguments))
    config = choose_config(is_fast=arguments.fast, given=given)

    from safebridge.diagnosis.run import run_diagnosis  # noqa: PLC0415 - torch is slow to import

    summary = run_diagnosis(
        arguments.model,
        arguments.out,
        config,
        defenses=arguments.defense,
        twins_file=arguments.twins,
        allow_other_model=arguments.allow_other_model,
        is_fast=arguments.fast,
        command=_write_command(arguments, given),
    )
    for finding in summary["verdict"]:
        sys.stdout.write(f"{finding['question']}: {finding['text']}\n")
        for number in finding["rests_on"]:
            sys.stdout.write(f"  {number}\n")
    out = arguments.out
    sys.stdout.write(f"report: {out / 'report.html'}\nnumbers: {out / 'numbers.json'}\n")
    return 0


def _write_command(arguments: argparse.Namespace, given: dict[str, Any]) -> str:
    """Return the command that does this run again."""
    words = ["safebridge", "diagnose", arguments.model, "--out", str(arguments.out)]
    for folder in arguments.defense:
        words += ["--defense", str(folder)]
    words += ["--allow-other-model"] if arguments.allow_other_model else []
    words += ["--twins", str(arguments.twins)] if arguments.twins else []
    words += ["--fast"] if arguments.fast else []
    for name, value in given.items():
        words += ["--" + name.replace("_", "-"), str(value)]
    return shlex.join(words)
