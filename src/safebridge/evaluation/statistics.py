"""Rates and differences of rates, each with n and a 95 % interval."""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from safebridge.errors import DataError

__all__ = ["Difference", "Rate", "measure_difference", "measure_rate", "wilson_interval"]


@final
@dataclass(frozen=True)
class Rate:
    """A fraction in [0, 1] with its interval."""

    value: float
    """The observed fraction."""

    low: float
    """Lower end of the interval."""

    high: float
    """Upper end of the interval."""

    n: int
    """How many answers it was counted on."""

    def to_json(self) -> dict[str, float | int]:
        """Return `{"value", "low", "high", "n"}`."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Rate":
        """Read what `to_json` wrote.

        Raises:
            DataError: If a field is missing or is no number.
        """
        try:
            low, value, high = (float(data[key]) for key in ("low", "value", "high"))
            return cls(value=value, low=low, high=high, n=int(data["n"]))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"a rate needs the numbers value, low, high and n, found {dict(data)}."
            ) from error

    def __str__(self) -> str:
        """Print the percentage with its interval and n, as reports do."""
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}], n = {self.n}"


@final
@dataclass(frozen=True)
class Difference:
    """A paired difference of two rates, after minus before."""

    value: float
    """Difference in [-1, 1]; negative when the rate fell."""

    low: float
    """Lower end of the interval."""

    high: float
    """Upper end of the interval."""

    n: int
    """How many pairs it was counted on."""

    p_value: float
    """Exact two-sided McNemar test of "no difference". It takes the pairs as independent; the
    interval is the one that knows about clusters."""

    def to_json(self) -> dict[str, float | int]:
        """Return `{"value", "low", "high", "n", "p_value"}`."""
        return asdict(self)


def wilson_interval(value: float, n: float, *, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval of a proportion.

    Args:
        value: The observed proportion.
        n: Number of observations; a fraction of one is allowed for effective sample sizes.
        confidence: Coverage aimed at.

    Source:
        Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    z = float(stats.norm.ppf(0.5 + confidence / 2))
    centre = (value + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(value * (1 - value) / n + z * z / (4 * n * n))
    # At 0 and 1 the formula returns the end itself, up to rounding.
    return (
        0.0 if value == 0 else max(0.0, centre - half),
        1.0 if value == 1 else min(1.0, centre + half),
    )


def measure_rate(
    outcomes: Sequence[bool],
    *,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
) -> Rate:
    """Count a rate and give it a Wilson interval.

    With `clusters`, answers about the same concept are not taken for independent: Wilson's
    formula gets the effective sample size n / deff, where deff is the cluster-robust variance
    over the binomial one, and is corrected for the number of clusters by Student's t. The result
    is never narrower than without clusters. Where all outcomes agree the variance says nothing,
    and every cluster counts once: cautious, and right if a concept's answers all go together.

    Args:
        outcomes: True where the counted thing happened.
        clusters: The cluster of each outcome, e.g. its concept; None takes all as independent.
        confidence: Coverage aimed at.

    Raises:
        DataError: If there is nothing to count, or `clusters` has another length.

    Source:
        Korn and Graubard 1998, "Confidence intervals for proportions with small expected number
        of positive counts estimated from survey data"; with Wilson's interval in place of
        Clopper and Pearson's, and the number of clusters instead of n where the variance is zero.
    """
    if len(outcomes) == 0:
        raise DataError("a rate needs at least one outcome, found none. Check the filter.")
    value = float(np.mean(np.asarray(outcomes, dtype=float)))
    size = _effective_size(outcomes, clusters, confidence)
    low, high = wilson_interval(value, size, confidence=confidence)
    return Rate(value=value, low=low, high=high, n=len(outcomes))


def measure_difference(
    before: Sequence[bool],
    after: Sequence[bool],
    *,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
) -> Difference:
    """Compare two rates that were counted on the same samples.

    The interval joins the intervals of the two rates and takes their correlation into account,
    so it stays honest where one rate is 0 or 1 and a bootstrap would have no width.

    Args:
        before: Outcomes of the first measurement.
        after: Outcomes of the second, in the same order.
        clusters: As in `measure_rate`.
        confidence: Coverage aimed at.

    Raises:
        DataError: If the two differ in length or are empty.

    Source:
        Newcombe 1998, "Improved confidence intervals for the difference between binomial
        proportions based on paired data", method 10; with the cluster-aware limits of
        `measure_rate` when `clusters` are given.
    """
    if len(before) != len(after):
        raise DataError(
            f"a paired difference needs the same samples twice, found {len(before)} before and "
            f"{len(after)} after. Run both on one list of samples."
        )
    first = measure_rate(before, clusters=clusters, confidence=confidence)
    second = measure_rate(after, clusters=clusters, confidence=confidence)
    phi = _correlation(np.asarray(before, dtype=bool), np.asarray(after, dtype=bool))
    value = second.value - first.value
    down_after, up_before = second.value - second.low, first.high - first.value
    up_after, down_before = second.high - second.value, first.value - first.low
    low = value - math.sqrt(
        max(0.0, down_after**2 - 2 * phi * down_after * up_before + up_before**2)
    )
    high = value + math.sqrt(
        max(0.0, up_after**2 - 2 * phi * up_after * down_before + down_before**2)
    )
    lost = sum(b and not a for b, a in zip(before, after, strict=True))
    won = sum(a and not b for b, a in zip(before, after, strict=True))
    p_value = float(stats.binomtest(won, won + lost).pvalue) if won + lost else 1.0
    return Difference(value, max(-1.0, low), min(1.0, high), first.n, p_value)


def _effective_size(
    outcomes: Sequence[bool], clusters: Sequence[Hashable] | None, confidence: float
) -> float:
    """Return how many independent outcomes hold as much information as these."""
    n = len(outcomes)
    if clusters is None:
        return float(n)
    if len(clusters) != n:
        raise DataError(f"{n} outcomes need as many clusters, found {len(clusters)}.")
    values = np.asarray(outcomes, dtype=float)
    codes = {cluster: code for code, cluster in enumerate(dict.fromkeys(clusters))}
    count = len(codes)
    mean = float(values.mean())
    if count == 1 or mean in {0.0, 1.0}:
        return float(count)
    sums = np.bincount([codes[cluster] for cluster in clusters], weights=values - mean)
    robust = count / (count - 1) * float(np.sum(sums**2)) / n**2
    effect = max(1.0, robust / (mean * (1 - mean) / n))
    tail = 0.5 + confidence / 2
    shrink = float(stats.norm.ppf(tail) / stats.t.ppf(tail, df=count - 1)) ** 2
    return max(1.0, n / effect * shrink)


def _correlation(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> float:
    """Return the correlation of two paired outcomes as Newcombe's method 10 takes it."""
    n = len(before)
    both, none = int(np.sum(before & after)), int(np.sum(~before & ~after))
    lost, won = int(np.sum(before & ~after)), int(np.sum(~before & after))
    margins = (both + lost) * (won + none) * (both + won) * (lost + none)
    if margins == 0:
        return 0.0
    cross = float(both * none - lost * won)
    if cross > 0:  # the continuity correction is for positive association only
        cross = max(cross - n / 2, 0.0)
    return cross / math.sqrt(margins)
