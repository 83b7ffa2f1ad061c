"""`safebridge ask MODEL`: one request, answered by the model as it is and with a defense."""

import argparse
import sys
from pathlib import Path
from typing import Any

from safebridge.errors import DataError
from safebridge.registry import METHODS, resolve

__all__ = ["add_parser"]


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to the parser.

    Args:
        commands: What `ArgumentParser.add_subparsers` returned.
        common: Parser with the options that every command has.
    """
    parser = commands.add_parser(
        "ask",
        parents=[common],
        help="ask a model one question, without and with a defense",
        description="Answer one request, about pictures or not, with the model as it is and, "
        "with --defense, with the defense applied.",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="hub name, local folder, safebridge/mini or tiny/<family>"
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the request")
    parser.add_argument(
        "--image",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a picture that goes with the request; may be given several times",
    )
    parser.add_argument(
        "--defense",
        type=Path,
        metavar="FOLDER",
        help="a fitted artifact, e.g. demo-results/artifact",
    )
    parser.add_argument(
        "--method",
        choices=sorted(METHODS),
        default="security-tensors",
        help="the method that the artifact was fitted with. Default: %(default)s.",
    )
    parser.add_argument(
        "--strength",
        type=float,
        default=1.0,
        metavar="FLOAT",
        help="how strongly the defense is applied; 0 is the model as it is. Default: 1.",
    )
    parser.add_argument(
        "--allow-other-model",
        action="store_true",
        help="apply the artifact although it was fitted on another model",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=64,
        metavar="INT",
        help="length at which an answer is cut. Default: %(default)s.",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the answer of the base model and, with a defense, of the defended one.

    Args:
        arguments: As parsed by the options of `add_parser`.

    Raises:
        DataError: If the request is empty or the length is not positive.
    """
    if not arguments.prompt.strip():
        raise DataError("--prompt is empty. Give the request that the model should answer.")
    if arguments.max_new_tokens < 1:
        raise DataError(f"--max-new-tokens must be 1 or more, found {arguments.max_new_tokens}.")

    from safebridge.data.sample import open_image  # noqa: PLC0415 - torch is slow to import
    from safebridge.models.generate import generate_answers  # noqa: PLC0415 - likewise
    from safebridge.models.load import load_vlm  # noqa: PLC0415 - likewise

    pictures = [open_image(path) for path in arguments.image]
    vlm = load_vlm(arguments.model)
    method = None
    if arguments.defense is not None:
        method = resolve("method", arguments.method, METHODS).load(
            arguments.defense, vlm, allow_other_model=arguments.allow_other_model
        )

    def answer() -> str:
        return generate_answers(
            vlm, [arguments.prompt], [pictures], max_new_tokens=arguments.max_new_tokens
        )[0]

    _print_answer("base", answer())
    if method is not None:
        with method.apply(vlm, strength=arguments.strength):
            _print_answer("defended", answer())
    return 0


def _print_answer(side: str, answer: str) -> None:
    from safebridge.evaluation.judges import score_refusal  # noqa: PLC0415 - as in run

    word = "refused" if score_refusal(answer).is_refusal else "answered"
    sys.stdout.write(f"{side} ({word}): {answer.strip() or '(nothing)'}\n")
