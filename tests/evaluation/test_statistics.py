"""Rates and differences against hand-solved cases, published values and simulation."""

import json

import numpy as np
import pytest
from scipy import stats

from safebridge.errors import DataError
from safebridge.evaluation.statistics import (
    Rate,
    measure_difference,
    measure_rate,
    wilson_interval,
)


@pytest.mark.parametrize(("hits", "n"), [(0, 20), (1, 30), (15, 148), (81, 263), (20, 20)])
def test_a_rate_has_wilsons_interval(hits: int, n: int) -> None:
    rate = measure_rate([True] * hits + [False] * (n - hits))
    expected = stats.binomtest(hits, n).proportion_ci(method="wilson")
    assert (rate.value, rate.n) == (hits / n, n)
    assert (rate.low, rate.high) == pytest.approx((expected.low, expected.high))


def test_wilson_meets_the_values_of_newcombes_table() -> None:
    # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I.
    assert wilson_interval(81 / 263, 263.0) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(1 / 29, 29.0) == pytest.approx((0.0061, 0.1718), abs=5e-5)


def test_clusters_of_one_change_only_the_t_correction() -> None:
    outcomes = [True] * 30 + [False] * 70
    plain = measure_rate(outcomes)
    clustered = measure_rate(outcomes, clusters=list(range(100)))
    assert clustered.value == plain.value
    assert clustered.low <= plain.low
    assert clustered.high >= plain.high
    assert clustered.high - clustered.low == pytest.approx(plain.high - plain.low, rel=0.05)


def test_copies_of_an_answer_add_no_information() -> None:
    outcomes = [True] * 6 + [False] * 14
    copies = [outcome for outcome in outcomes for _ in range(10)]
    clusters = [index for index in range(20) for _ in range(10)]
    once = measure_rate(outcomes, clusters=list(range(20)))
    ten_times = measure_rate(copies, clusters=clusters)
    assert (ten_times.low, ten_times.high) == pytest.approx((once.low, once.high))
    assert ten_times.n == 200


def test_where_all_outcomes_agree_every_cluster_counts_once() -> None:
    rate = measure_rate([False] * 100, clusters=[index % 10 for index in range(100)])
    assert rate.high == pytest.approx(measure_rate([False] * 10).high)


def test_clustered_intervals_cover_where_plain_ones_do_not() -> None:
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(30), 10).tolist()
    covered = {"plain": 0, "clustered": 0}
    for _ in range(400):
        chances = np.repeat(rng.beta(1.4, 0.6, size=30), 10)
        outcomes = (rng.random(300) < chances).tolist()
        plain = measure_rate(outcomes)
        clustered = measure_rate(outcomes, clusters=clusters)
        covered["plain"] += plain.low <= 0.7 <= plain.high
        covered["clustered"] += clustered.low <= 0.7 <= clustered.high
    assert covered["plain"] / 400 < 0.8
    assert 0.92 <= covered["clustered"] / 400 <= 0.99


def test_a_paired_difference_meets_newcombes_worked_example() -> None:
    # Newcombe 1998 (paired data), 36 both, 12 and 2 discordant, 0 neither: method 10 gives
    # 0.0569 to 0.3404 for before minus after.
    before = [True] * 36 + [True] * 12 + [False] * 2
    after = [True] * 36 + [False] * 12 + [True] * 2
    difference = measure_difference(before, after)
    assert difference.value == pytest.approx(-0.2)
    assert difference.n == 50
    assert difference.p_value == pytest.approx(stats.binomtest(2, 14).pvalue)
    assert (difference.low, difference.high) == pytest.approx((-0.3404, -0.0569), abs=5e-5)
    mirrored = measure_difference(after, before)
    assert (mirrored.low, mirrored.high) == pytest.approx((-difference.high, -difference.low))


def test_paired_intervals_cover_the_true_difference() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(400):
        before = rng.random(80) < 0.2
        after = before | (rng.random(80) < 0.5)
        interval = measure_difference(before.tolist(), after.tolist())
        covered += interval.low <= 0.4 <= interval.high
    assert 0.92 <= covered / 400 <= 0.99


def test_equal_outcomes_differ_by_nothing_but_still_have_a_width() -> None:
    difference = measure_difference([True] * 30, [True] * 30)
    assert (difference.value, difference.p_value) == (0.0, 1.0)
    assert difference.low < 0 < difference.high


def test_rates_go_through_json() -> None:
    rate = measure_rate([True, False, True])
    assert Rate.from_json(json.loads(json.dumps(rate.to_json()))) == rate
    assert set(rate.to_json()) == {"value", "low", "high", "n"}
    assert str(Rate(0.5, 0.25, 0.75, 12)) == "50.0% [25.0%, 75.0%], n = 12"


def test_what_cannot_be_counted_says_why() -> None:
    with pytest.raises(DataError, match="at least one outcome"):
        measure_rate([])
    with pytest.raises(DataError, match="as many clusters, found 1"):
        measure_rate([True, False], clusters=["a"])
    with pytest.raises(DataError, match="Run both on one list of samples"):
        measure_difference([True], [True, False])
    with pytest.raises(DataError, match="value, low, high and n"):
        Rate.from_json({"value": 0.5})
