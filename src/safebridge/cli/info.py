"""`safebridge info MODEL`: where a model keeps its parts, and how large they are."""

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

__all__ = ["add_parser"]


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to the parser.

    Args:
        commands: What `ArgumentParser.add_subparsers` returned.
        common: Parser with the options that every command has.
    """
    parser = commands.add_parser(
        "info",
        parents=[common],
        help="print where a model keeps its vision tower, projector, decoder layers, ...",
        description="Load a vision-language model and print the layout that Safebridge found.",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="hub name, local folder, safebridge/mini or tiny/<family>"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the layout of a model.

    Args:
        arguments: `model` and `json` as parsed.
    """
    from safebridge.models.load import load_vlm  # noqa: PLC0415 - torch is slow to import

    vlm = load_vlm(arguments.model)
    facts: dict[str, Any] = {
        "model": vlm.name,
        "class": type(vlm.model).__name__,
        "fingerprint": vlm.fingerprint,
        "parameters": sum(parameter.numel() for parameter in vlm.model.parameters()),
        **asdict(vlm.layout),
    }
    if arguments.json:
        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
        return 0
    width = max(len(name) for name in facts)
    facts["parameters"] = f"{facts['parameters']:,}"
    for name, value in facts.items():
        sys.stdout.write(f"{name:<{width}}  {_to_text(value)}\n")
    return 0


def _to_text(value: Any) -> str:
    if isinstance(value, tuple | list):
        return ", ".join(str(item) for item in value) or "none"
    return "none" if value is None else str(value)
