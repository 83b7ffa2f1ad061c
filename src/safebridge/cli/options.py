"""Options that several commands share."""

import argparse
from pathlib import Path

__all__ = ["add_training_options"]


def add_training_options(parser: argparse.ArgumentParser, *, cache: str) -> None:
    """Add what every fit on the training loop takes besides its settings.

    Args:
        parser: Receives the options.
        cache: What the cache folder keeps, as the help says it.
    """
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="written after each epoch; if it exists, the fit goes on from it",
    )
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help=cache)
    parser.add_argument(
        "--tensorboard", type=Path, metavar="FOLDER", help="write the losses as TensorBoard events"
    )
    parser.add_argument(
        "--dtype", default="auto", metavar="TYPE", help="type of the weights. Default: auto."
    )
