"""What a fit shows while it runs: a progress bar with the loss of each set, and TensorBoard."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from safebridge.optional import require
from safebridge.training.loop import TrainingEvent

__all__ = ["call_all", "show_training", "write_tensorboard"]

ProgressCallback = Callable[[TrainingEvent], object]


@contextmanager
def show_training(
    description: str, *, console: Console | None = None
) -> Iterator[ProgressCallback]:
    """Show a progress bar with the loss of each set.

    Args:
        description: What stands before the bar.
        console: Where to draw; standard error by default, so that output can be piped.

    Yields:
        A function for the `progress` argument of `train` and of a method's `fit`.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[losses]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console or Console(stderr=True)) as bar:
        task = bar.add_task(description, total=None, losses="")

        def show(event: TrainingEvent) -> None:
            parts = [f"{name} {value:.3f}" for name, value in sorted(event.losses.items())]
            if event.score is not None:
                parts.append(f"score {event.score:.3f}")
            bar.update(task, completed=event.step, total=event.total_steps, losses="  ".join(parts))

        yield show


@contextmanager
def write_tensorboard(folder: Path | str) -> Iterator[ProgressCallback]:
    """Write the loss of each set and the validation score as TensorBoard events.

    Args:
        folder: Where to; `tensorboard --logdir FOLDER` shows it.

    Yields:
        A function for the `progress` argument of `train` and of a method's `fit`.

    Raises:
        MissingExtraError: If TensorBoard is not installed.
    """
    require("tensorboard", extra="tensorboard")
    writer: Any = require("torch.utils.tensorboard", extra="tensorboard").SummaryWriter(
        log_dir=str(folder)
    )

    def write(event: TrainingEvent) -> None:
        for name, value in event.losses.items():
            writer.add_scalar(f"loss per {event.kind}/{name}", value, event.step)
        if event.score is not None:
            writer.add_scalar("score", event.score, event.step)

    try:
        yield write
    finally:
        writer.close()


def call_all(*callbacks: ProgressCallback) -> ProgressCallback:
    """Return one callback that calls several.

    Args:
        *callbacks: Called in this order.
    """

    def call(event: TrainingEvent) -> None:
        for callback in callbacks:
            callback(event)

    return call
