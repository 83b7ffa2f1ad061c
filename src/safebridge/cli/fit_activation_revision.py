"""`safebridge fit activation-revision`: vectors added to heads or layers that turn answers safe."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from safebridge.cli.fields import add_config_arguments, read_config
from safebridge.errors import DataError
from safebridge.methods.activation_revision.config import ActivationRevisionConfig

if TYPE_CHECKING:
    from safebridge.data.sample import Sample

__all__ = ["HELP", "NAME", "add_options", "fit"]

NAME = "activation-revision"
HELP = "learn vectors for heads or layers from safe and unsafe responses or instructions"

_STRATEGIES = ("single-response", "multi-response", "multi-instruction", "reminder", "given")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this method.

    Args:
        parser: Receives them.
    """
    parser.add_argument(
        "--strategy",
        choices=_STRATEGIES,
        default="multi-response",
        help="how the harmful requests of --data become contrastive groups: one fixed pair of "
        "responses, several responses each, harmless requests of the same wording or picture, a "
        "safety reminder; or the samples are groups as given. Default: %(default)s.",
    )
    parser.add_argument(
        "--pictures",
        type=Path,
        metavar="FOLDER",
        help="folder of the pictures, if --data is a .json file in VLGuard's form",
    )
    parser.add_argument(
        "--responses",
        type=int,
        default=4,
        metavar="INT",
        help="safe and unsafe responses of each request with multi-response. Default: 4.",
    )
    parser.add_argument(
        "--benign",
        type=Path,
        metavar="FILE",
        help="harmless requests for the gate, as JSON lines; default: those of --data",
    )
    parser.add_argument(
        "--harmful",
        type=Path,
        metavar="FILE",
        help="more harmful requests for the gate, as JSON lines",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="FOLDER",
        help="keeps the captured activations, so that a fit that was stopped goes on",
    )
    parser.add_argument(
        "--dtype", default="auto", metavar="TYPE", help="type of the weights. Default: auto."
    )
    add_config_arguments(parser, ActivationRevisionConfig, "settings")


def fit(arguments: argparse.Namespace) -> list[str]:
    """Fit an activation revision and save it.

    Args:
        arguments: As parsed.

    Returns:
        What to print.

    Raises:
        DataError: If the samples cannot be used.
    """
    config = read_config(ActivationRevisionConfig, arguments.config, vars(arguments))
    if arguments.responses < 1:
        raise DataError(f"--responses must be 1 or more, found {arguments.responses}.")
    if config.gate == "none" and (arguments.benign or arguments.harmful):
        raise DataError(
            "--benign and --harmful are for a gate, and there is none. Give --gate probe or "
            "--gate cosine, or leave them out."
        )

    from safebridge.data.files import load_samples  # noqa: PLC0415 - torch is slow to import
    from safebridge.methods.activation_revision.method import (  # noqa: PLC0415 - likewise
        ActivationRevision,
    )
    from safebridge.models.load import load_vlm  # noqa: PLC0415 - likewise

    found = _read_file(arguments.data, arguments.pictures)
    samples = _build(found, arguments, config.seed)
    benign = [sample for sample in found if not sample.is_harmful]
    if arguments.benign is not None:
        benign = load_samples(arguments.benign)
    harmful = [] if arguments.harmful is None else load_samples(arguments.harmful)
    vlm = load_vlm(arguments.model, dtype=arguments.dtype)
    method = ActivationRevision.fit(
        vlm,
        samples,
        config,
        harmful=harmful,
        benign=benign,
        cache=arguments.cache,
        data_source=str(arguments.data),
    )
    method.save(arguments.out)
    names = [f"{layer}" if head < 0 else f"{layer}.{head}" for layer, head in method.sites[:8]]
    accuracy = float(method.tensors["accuracy"].max())
    return [
        f"fitted on {method.metadata.details['groups']} groups; best probe {accuracy:.0%} held out",
        f"revises {len(method.sites)} {config.level}s, first {', '.join(names)}",
        f"artifact: {arguments.out}",
    ]


def _read_file(path: Path, pictures: Path | None) -> "list[Sample]":
    from safebridge.data.files import load_samples  # noqa: PLC0415 - as in fit
    from safebridge.methods.activation_revision.samples import load_vlguard  # noqa: PLC0415

    if path.suffix.lower() == ".json":
        return load_vlguard(path, pictures or path.parent)
    return load_samples(path)


def _build(found: "list[Sample]", arguments: argparse.Namespace, seed: int) -> "list[Sample]":
    """Make contrastive groups of what was read."""
    from safebridge.methods.activation_revision import samples as build  # noqa: PLC0415 - as in fit

    harmful = [sample for sample in found if sample.is_harmful]
    harmless = [sample for sample in found if not sample.is_harmful]
    if arguments.strategy == "given":
        return build.check_groups(found)
    if arguments.strategy == "single-response":
        return build.build_single_response(harmful)
    if arguments.strategy == "multi-response":
        return build.build_multi_response(harmful, count=arguments.responses, seed=seed)
    if arguments.strategy == "reminder":
        return build.build_reminded(harmful, seed=seed)
    pairs = build.pair_by_picture(found) or build.pair_by_request(harmless, harmful, seed=seed)
    if not pairs:
        raise DataError(
            f"{arguments.data} has no harmless request with the picture or the wording of a "
            "harmful one. Add some, or use another --strategy."
        )
    return build.build_multi_instruction(pairs)
