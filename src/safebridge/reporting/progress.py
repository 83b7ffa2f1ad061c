"""Progress bars and stopwatch of the demo: one line for each phase."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import final

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

__all__ = ["Phases", "show_phases"]


@final
class Phases:
    """Shows what is going on and remembers how long each phase took.

    Args:
        bars: Where to draw.
    """

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str, text: str, total: int = 1) -> Iterator[Callable[[int], None]]:
        """Show one bar; it is full when the block ends without an error.

        Args:
            name: Key in `seconds`; a name that comes twice is added up.
            text: What stands before the bar.
            total: Number of steps.

        Yields:
            A function that moves the bar by a number of steps; any thread may call it.
        """
        bar = self._bars.add_task(text, total=total)
        start = time.perf_counter()
        yield lambda steps: self._bars.advance(bar, steps)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        self._bars.update(bar, completed=total)


@contextmanager
def show_phases(console: Console | None = None) -> Iterator[Phases]:
    """Draw the bars of all phases below each other.

    Args:
        console: Where to draw; standard error by default, so that output can be piped.

    Yields:
        The phases, none so far.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console or Console(stderr=True)) as bars:
        yield Phases(bars)
