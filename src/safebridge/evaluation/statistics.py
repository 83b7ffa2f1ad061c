"""Rates and differences of rates, each with n and a 95 % interval."""

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from safebridge.errors import DataError
from safebridge.optional import require

__all__ = [
    "Difference",
    "ErrorRates",
    "Estimate",
    "Rate",
    "adjust_p_values",
    "bootstrap_interval",
    "correct_difference",
    "correct_rate",
    "measure_difference",
    "measure_rate",
    "wilson_interval",
]


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


@final
@dataclass(frozen=True)
class Estimate:
    """Any number with its interval."""

    value: float
    """The estimate."""

    low: float
    """Lower end of the interval."""

    high: float
    """Upper end of the interval."""

    n: int
    """How many answers it rests on."""

    def to_json(self) -> dict[str, float | int]:
        """Return `{"value", "low", "high", "n"}`."""
        return asdict(self)


@final
@dataclass(frozen=True)
class ErrorRates:
    """How often a judge is right, measured on answers that people have labelled."""

    recall: Rate
    """Of the answers people call refusals, the share that the judge does."""

    false_alarm_rate: Rate
    """Of the answers people call no refusal, the share that the judge calls one."""


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


def adjust_p_values(p_values: Sequence[float]) -> list[float]:
    """Adjust the p-values of several tests by Holm's method.

    A test whose adjusted value is below 5 % holds even though several were done.

    Args:
        p_values: One for each test; may be empty.

    Raises:
        DataError: If one is no probability.
        MissingExtraError: If statsmodels is not installed.

    Source:
        Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    if any(not 0 <= p <= 1 for p in p_values):
        raise DataError(f"p-values must be between 0 and 1, found {list(p_values)}.")
    if not p_values:
        return []
    multitest = require("statsmodels.stats.multitest", extra="reports")
    return [float(p) for p in multitest.multipletests(list(p_values), method="holm")[1]]


def bootstrap_interval(
    statistic: Callable[[NDArray[np.intp]], float],
    n: int,
    *,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Estimate any statistic of samples with a bootstrap percentile interval.

    Args:
        statistic: Takes the numbers of the drawn samples, one of them possibly several times.
        n: Number of samples.
        clusters: The cluster of each sample; whole clusters are drawn.
        confidence: Coverage aimed at.
        draws: Number of draws.
        seed: Seed of the draws.

    Raises:
        DataError: If there are no samples, or `clusters` has another length.
    """
    if n < 1:
        raise DataError("a bootstrap needs at least one sample, found none. Check the filter.")
    if clusters is not None and len(clusters) != n:
        raise DataError(f"{n} outcomes need as many clusters, found {len(clusters)}.")
    names = range(n) if clusters is None else clusters
    members: dict[Hashable, list[int]] = {}
    for index, name in enumerate(names):
        members.setdefault(name, []).append(index)
    groups = [np.asarray(own) for own in members.values()]
    value = float(statistic(np.arange(n)))
    if len(groups) == 1:  # one cluster says nothing about the next
        return Estimate(value, value, value, n)
    found = stats.bootstrap(
        (np.arange(len(groups)),),
        lambda drawn: statistic(np.concatenate([groups[number] for number in drawn])),
        n_resamples=draws,
        vectorized=False,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(value, float(found.low), float(found.high), n)


def correct_rate(
    judged: Sequence[bool],
    error: ErrorRates,
    *,
    clusters: Sequence[Hashable] | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> Estimate:
    r"""Estimate the rate that people would find from the rate that a judge found.

    Computes $(p - f) / (r - f)$, cut to [0, 1], from the judge's rate $p$, its recall $r$ and
    its false-alarm rate $f$. The bootstrap draws answers and, from their binomials, the two
    error rates, so the interval knows that the judge's error is itself an estimate. It is right
    for answers like those that the error was measured on, and no others.

    Args:
        judged: True where the judge found a refusal.
        error: The judge's error.
        clusters: As in `measure_rate`.
        draws: Number of draws.
        seed: Seed of the draws.

    Raises:
        DataError: If there is nothing to count, or the judge is no better than chance.

    Source:
        Rogan and Gladen 1978, "Estimating prevalence from the results of a screening test".
    """
    _check_judge(error)
    outcomes = np.asarray(judged, dtype=float)
    errors = _draw_errors([error], seed)

    def estimate(rows: NDArray[np.intp]) -> float:
        ((recall, false_alarms),) = next(errors)
        return _corrected(float(outcomes[rows].mean()), recall, false_alarms)

    return bootstrap_interval(estimate, len(judged), clusters=clusters, draws=draws, seed=seed)


def correct_difference(
    before: Sequence[bool],
    after: Sequence[bool],
    before_error: ErrorRates,
    after_error: ErrorRates,
    *,
    clusters: Sequence[Hashable] | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Estimate the paired difference that people would find, after minus before.

    Args:
        before: Where the judge found a refusal in the first measurement.
        after: The same in the second, in the same order.
        before_error: The judge's error on answers like those of the first.
        after_error: The judge's error on answers like those of the second.
        clusters: As in `measure_rate`.
        draws: Number of draws.
        seed: Seed of the draws.

    Raises:
        DataError: If the two differ in length or are empty, or the judge is no better than
            chance.

    Source:
        As `correct_rate`, for each side.
    """
    if len(before) != len(after):
        raise DataError(
            f"a paired difference needs the same samples twice, found {len(before)} before and "
            f"{len(after)} after. Run both on one list of samples."
        )
    both = [before_error, after_error]
    for error in both:
        _check_judge(error)
    errors = _draw_errors(both, seed)
    sides = [np.asarray(side, dtype=float) for side in (before, after)]

    def estimate(rows: NDArray[np.intp]) -> float:
        first, second = (
            _corrected(float(side[rows].mean()), *error)
            for side, error in zip(sides, next(errors), strict=True)
        )
        return second - first

    return bootstrap_interval(estimate, len(before), clusters=clusters, draws=draws, seed=seed)


def _check_judge(error: ErrorRates) -> None:
    if error.recall.value <= error.false_alarm_rate.value:
        raise DataError(
            f"a judge with recall {error.recall.value:.2f} and false alarms "
            f"{error.false_alarm_rate.value:.2f} is no better than chance, so its rates cannot be "
            "corrected. Take another judge."
        )


def _corrected(rate: float, recall: float, false_alarms: float) -> float:
    if recall <= false_alarms:  # a draw in which the judge is useless bounds nothing
        return rate
    return min(1.0, max(0.0, (rate - false_alarms) / (recall - false_alarms)))


def _draw_errors(errors: Sequence[ErrorRates], seed: int) -> Iterator[list[tuple[float, float]]]:
    """Yield recall and false-alarm rate of each judge: as measured, then drawn anew each time."""
    yield [(error.recall.value, error.false_alarm_rate.value) for error in errors]
    rng = np.random.default_rng([seed, 1])
    while True:
        yield [
            (
                rng.binomial(error.recall.n, error.recall.value) / error.recall.n,
                rng.binomial(error.false_alarm_rate.n, error.false_alarm_rate.value)
                / error.false_alarm_rate.n,
            )
            for error in errors
        ]


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
