"""Curves over decoder layers, and the bootstrap over prompts that gives them their bands."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from safebridge.errors import DataError

__all__ = ["LayerCurve", "bootstrap_curve", "draw_weights"]

_COVERAGE = (0.025, 0.975)


@final
@dataclass(frozen=True)
class LayerCurve:
    """One value per decoder layer with a band."""

    name: str
    """What was compared, e.g. "picture"."""

    values: tuple[float, ...]
    """The value of each decoder layer, the first layer first."""

    low: tuple[float, ...]
    """Lower end of the 95 % bootstrap interval of each layer."""

    high: tuple[float, ...]
    """Upper end of the 95 % bootstrap interval of each layer."""

    n: int
    """Number of prompts on each side."""

    layers: tuple[int, ...] = ()
    """The decoder layers, from 0; empty stands for all of them."""


def draw_weights(
    clusters: Sequence[str], *, draws: int, generator: torch.Generator
) -> Float[Tensor, "draws n"]:
    """Return how often each prompt comes up in each bootstrap draw.

    Whole clusters are drawn with replacement, because prompts about the same thing are not
    independent.

    Args:
        clusters: The cluster of each prompt, e.g. its concept.
        draws: Number of draws.
        generator: Source of chance.
    """
    names = {cluster: number for number, cluster in enumerate(dict.fromkeys(clusters))}
    own = torch.tensor([names[cluster] for cluster in clusters])
    count = len(names)
    drawn = torch.randint(count, (draws, count), generator=generator)
    times = torch.zeros(draws, count).scatter_add_(1, drawn, torch.ones(draws, count))
    return times[:, own]


def bootstrap_curve(
    measure: Callable[[list[Tensor]], Float[Tensor, "draws layers"]],
    clusters: Sequence[Sequence[str]],
    *,
    name: str,
    layers: Sequence[int] = (),
    draws: int = 200,
    seed: int = 0,
) -> LayerCurve:
    """Measure a curve and draw its 95 % percentile band.

    Args:
        measure: Takes one [draws, n] tensor of weights for each group of prompts and returns
            the curve of each draw; all weights 1 is the measurement itself.
        clusters: The clusters of each group.
        name: Name of the curve.
        layers: Its decoder layers, from 0.
        draws: Number of draws.
        seed: Seed of the draws.

    Raises:
        DataError: If no draw could be measured.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = [draw_weights(own, draws=draws, generator=generator) for own in clusters]
    values = measure([torch.ones(1, len(own)) for own in clusters])[0]
    drawn = measure(weights)
    # A draw in which a pair or a class is missing says nothing about the band.
    drawn = drawn[drawn.isfinite().all(dim=1)]
    if not len(drawn) or not bool(values.isfinite().all()):
        raise DataError(
            f"the curve '{name}' cannot be measured on {[len(own) for own in clusters]} prompts; "
            "give more of them, about different things."
        )
    ends = torch.quantile(drawn.double(), torch.tensor(_COVERAGE, dtype=torch.float64), dim=0)
    return LayerCurve(
        name=name,
        values=tuple(values.tolist()),
        low=tuple(ends[0].tolist()),
        high=tuple(ends[1].tolist()),
        n=min(len(own) for own in clusters),
        layers=tuple(layers),
    )
