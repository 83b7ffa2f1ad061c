"""`safebridge fit security-tensors`: virtual tokens, a pixel tensor, or both."""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safebridge.cli.fields import add_config_arguments, read_config
from safebridge.cli.options import add_training_options
from safebridge.errors import DataError
from safebridge.methods.security_tensors.config import SecurityTensorsConfig

if TYPE_CHECKING:
    from safebridge.data.sample import Sample
    from safebridge.methods.security_tensors.method import Validation
    from safebridge.models.load import VLM

__all__ = ["HELP", "NAME", "add_options", "fit"]

NAME = "security-tensors"
HELP = "learn virtual tokens or a pixel tensor that carry text safety over to pictures"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this method.

    Args:
        parser: Receives them.
    """
    parser.add_argument(
        "--pictures",
        type=Path,
        metavar="FOLDER",
        help="folder of the pictures, if --data is a .json file in the authors' layout",
    )
    parser.add_argument(
        "--validation",
        type=Path,
        metavar="FILE",
        help="held-out samples; after each epoch they are scored, and the best epoch is kept",
    )
    parser.add_argument(
        "--hold-out",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="instead of --validation: share of the pictures of --data to hold out. Default: 0.",
    )
    parser.add_argument(
        "--score",
        choices=("rates", "loss"),
        default="rates",
        help="what held-out samples are scored by: refusals on harm less false refusals in "
        "generated answers, or the loss. Default: %(default)s.",
    )
    add_training_options(
        parser,
        cache="keeps what is computed once, for this and later fits on the same samples",
    )
    add_config_arguments(parser, SecurityTensorsConfig, "settings")


def fit(arguments: argparse.Namespace) -> list[str]:
    """Fit a security tensor and save it.

    Args:
        arguments: As parsed.

    Returns:
        What to print.

    Raises:
        DataError: If the samples or the held-out share cannot be used.
    """
    config = read_config(SecurityTensorsConfig, arguments.config, vars(arguments))

    from safebridge.methods.security_tensors.method import SecurityTensors  # noqa: PLC0415 - torch is slow to import
    from safebridge.models.load import load_vlm  # noqa: PLC0415 - likewise
    from safebridge.training.processes import find_device, is_main_process  # noqa: PLC0415 - likewise

    samples, held_out = _read_samples(arguments)
    vlm = load_vlm(arguments.model, dtype=arguments.dtype, device_map=find_device())
    with _show(arguments) as progress:
        method = SecurityTensors.fit(
            vlm,
            samples,
            config,
            validation=_validation(vlm, held_out, arguments.score),
            progress=progress,
            checkpoint=arguments.checkpoint,
            cache=arguments.cache,
            data_source=str(arguments.data),
        )
    if not is_main_process():
        return []
    method.save(arguments.out)
    details = method.metadata.details
    last = "  ".join(f"{name} {value:.3f}" for name, value in sorted(details["losses"][-1].items()))
    stopped = ", stopped early" if details["is_stopped_early"] else ""
    return [f"fitted in {details['steps']} steps{stopped}: {last}", f"artifact: {arguments.out}"]


def _read_samples(arguments: argparse.Namespace) -> "tuple[list[Sample], list[Sample]]":
    """Return the samples to fit on and the held-out ones."""
    from safebridge.methods.security_tensors.validation import split_by_picture  # noqa: PLC0415 - as in fit

    samples = _read_file(arguments.data, arguments.pictures)
    if arguments.validation is not None and arguments.hold_out:
        raise DataError("both --validation and --hold-out are given. Leave one out.")
    if arguments.validation is not None:
        return samples, _read_file(arguments.validation, arguments.pictures)
    if arguments.hold_out:
        seed = getattr(arguments, "seed", 0)
        return split_by_picture(samples, arguments.hold_out, seed=seed)
    return samples, []


def _read_file(path: Path, pictures: Path | None) -> "list[Sample]":
    from safebridge.data.files import load_samples  # noqa: PLC0415 - as in fit
    from safebridge.data.released import read_released_triad  # noqa: PLC0415 - as in fit

    if path.suffix.lower() == ".json":
        return read_released_triad(path, pictures=pictures)
    return load_samples(path)


def _validation(vlm: "VLM", held_out: "Sequence[Sample]", score: str) -> "Validation | None":
    from safebridge.evaluation.judges import score_refusal  # noqa: PLC0415 - as in fit
    from safebridge.methods.security_tensors.validation import RateValidation  # noqa: PLC0415 - as in fit

    if not held_out:
        return None
    if score == "loss":
        return held_out
    return RateValidation(vlm, held_out, is_refusal=lambda text: score_refusal(text).is_refusal)


@contextmanager
def _show(arguments: argparse.Namespace) -> Iterator[Any]:
    """Show a bar and, if asked for, write TensorBoard events; in the first process alone."""
    from safebridge.training.processes import is_main_process  # noqa: PLC0415 - as in fit
    from safebridge.training.reports import call_all, show_training, write_tensorboard  # noqa: PLC0415 - as in fit

    if not is_main_process():
        yield None
        return
    with ExitStack() as stack:
        callbacks = [stack.enter_context(show_training("fitting"))]
        if arguments.tensorboard is not None:
            callbacks.append(stack.enter_context(write_tensorboard(arguments.tensorboard)))
        yield call_all(*callbacks)
