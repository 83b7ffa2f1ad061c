"""The scaling test of safety layers: how refusals change when a band of layers gets louder."""

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, final

from torch import nn

from safebridge.errors import LayoutError, SettingError
from safebridge.models.load import VLM

__all__ = ["AlphaStep", "BoundSweep", "choose_alpha", "refine_range", "scaled_layers"]

Count = Callable[[int, int, float], int]
"""Number of refusals with layers first..last scaled by alpha."""

_MATRIX_DIMS: Final = 2


@contextmanager
def scaled_layers(vlm: VLM, first: int, last: int, alpha: float) -> Iterator[None]:
    """Multiply the weight matrices of attention and feed-forward in a band of layers.

    Biases and norms stay as they are. The weights are the very same tensors afterwards, also
    on an error.

    Args:
        vlm: The model.
        first: First decoder layer, from 0.
        last: Last decoder layer, included.
        alpha: The factor; 1 changes nothing.

    Yields:
        Nothing.

    Raises:
        ShapeError: If there is no such layer.
        LayoutError: If a layer has no weight matrices.

    Source:
        Li et al. 2025, "Safety Layers in Aligned Large Language Models", section 3.4
        (arXiv:2408.17003). Their script leaves the attention's output projection unscaled by
        mistake; here it is scaled, as the paper says.
    """
    matrices = [matrix for layer in range(first, last + 1) for matrix in _matrices_of(vlm, layer)]
    originals = [matrix.data for matrix in matrices]
    try:
        for matrix in matrices:
            matrix.data = matrix.data * alpha
        yield
    finally:
        for matrix, original in zip(matrices, originals, strict=True):
            matrix.data = original


def _matrices_of(vlm: VLM, layer: int) -> list[nn.Parameter]:
    parts = [vlm.layout.in_layer(vlm.model, layer, place) for place in ("attention", "mlp")]
    found = [p for part in parts for p in part.parameters() if p.ndim >= _MATRIX_DIMS]
    if not found:
        raise LayoutError(f"decoder layer {layer} of {vlm.name} has no weight matrices to scale.")
    return found


@final
@dataclass(frozen=True)
class BoundSweep:
    """Refusals for each bound that was tried, and the range they point to."""

    alpha: float
    """The factor."""

    upper: tuple[tuple[int, int], ...]
    """Last layer and number of refusals, with the first layer as given."""

    lower: tuple[tuple[int, int], ...]
    """First layer and number of refusals, with the best last layer."""

    first: int
    """The first safety layer."""

    last: int
    """The last safety layer, included."""


@final
@dataclass(frozen=True)
class AlphaStep:
    """One factor that was tried."""

    alpha: float
    """The factor."""

    spread: float
    """Standard deviation of the refusals over the upper bounds."""


def refine_range(
    count: Count, first: int, last: int, *, num_layers: int, alpha: float, reach: int = 2
) -> BoundSweep:
    """Move the bounds of a range to where scaling it changes refusals most.

    With alpha above 1 the count is maximised, below 1 minimised; the last layer first, then,
    with that one, the first layer. Of equal counts the one nearest to the given bound wins.

    Args:
        count: Counts the refusals of harmless but dangerous-sounding requests.
        first: First layer of the range to start from.
        last: Its last layer, included.
        num_layers: Number of decoder layers.
        alpha: The factor, see `choose_alpha`.
        reach: How many layers each bound may move either way.

    Raises:
        SettingError: If alpha is 1.

    Source:
        Li et al. 2025, "Safety Layers in Aligned Large Language Models", section 3.4.
    """
    if alpha == 1:
        raise SettingError("alpha=1 changes nothing. Take a factor above or below 1.")
    sign = 1 if alpha > 1 else -1

    def best(tried: dict[int, int], start: int) -> int:
        return max(tried, key=lambda bound: (sign * tried[bound], -abs(bound - start), -bound))

    ends = range(max(first, last - reach), min(num_layers - 1, last + reach) + 1)
    upper = {end: count(first, end, alpha) for end in ends}
    best_last = best(upper, last)
    starts = range(max(0, first - reach), min(best_last, first + reach) + 1)
    lower = {start: count(start, best_last, alpha) for start in starts}
    return BoundSweep(
        alpha, tuple(upper.items()), tuple(lower.items()), best(lower, first), best_last
    )


def choose_alpha(
    count: Count,
    first: int,
    last: int,
    *,
    num_layers: int,
    least_spread: float,
    is_raised: bool = True,
    step: float = 0.05,
    most_steps: int = 10,
    reach: int = 2,
) -> tuple[AlphaStep, ...]:
    """Step away from 1 until the bounds matter: the last step is the factor to use.

    Too close to 1 nothing changes, and too far the model writes nonsense; the paper stops
    where the standard deviation of the counts over a sweep of the upper bound first reaches
    15 to 20, of 721 requests.

    Args:
        count: As in `refine_range`.
        first: As in `refine_range`.
        last: As in `refine_range`.
        num_layers: As in `refine_range`.
        least_spread: The standard deviation to reach; the paper's is 2.1 to 2.8 % of the
            requests.
        is_raised: Go above 1; False goes below, for a model that refuses much already.
        step: Size of a step.
        most_steps: Steps after which the search gives up and keeps the widest spread so far.
        reach: As in `refine_range`.

    Returns:
        The factors in the order in which they were tried; the last one is the choice.

    Raises:
        SettingError: If the step leaves nothing to try.
    """
    if not 0 < step < 1 or most_steps < 1 or (not is_raised and step * most_steps >= 1):
        raise SettingError(
            f"step={step} and most_steps={most_steps} leave no factor above 0. Take smaller ones."
        )
    ends = range(max(first, last - reach), min(num_layers - 1, last + reach) + 1)
    tried: list[AlphaStep] = []
    for number in range(1, most_steps + 1):
        alpha = round(1 + (step if is_raised else -step) * number, 9)
        spread = statistics.pstdev([count(first, end, alpha) for end in ends])
        tried.append(AlphaStep(alpha, spread))
        if spread >= least_spread:
            return tuple(tried)
    widest = max(tried, key=lambda one: one.spread)
    return (*(one for one in tried if one is not widest), widest)
