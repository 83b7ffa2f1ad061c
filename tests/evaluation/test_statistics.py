"""Rates and differences against hand-solved cases, published values and simulation."""

import json

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from statsmodels.stats import contingency_tables

from safebridge.errors import DataError
from safebridge.evaluation.statistics import (
    ErrorRates,
    Rate,
    adjust_p_values,
    bootstrap_interval,
    correct_difference,
    correct_rate,
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


def test_the_p_value_is_statsmodels_exact_mcnemar() -> None:
    before = [True] * 9 + [False] * 2 + [True] * 7 + [False] * 5
    after = [False] * 9 + [True] * 2 + [True] * 7 + [False] * 5
    table = [[7, 9], [2, 5]]
    wanted = contingency_tables.mcnemar(table, exact=True).pvalue
    assert measure_difference(before, after).p_value == pytest.approx(wanted)


def test_holm_adjusts_a_case_solved_by_hand() -> None:
    # Sorted 0.01, 0.02, 0.04 times 3, 2, 1, each at least as large as the one before.
    assert adjust_p_values([0.04, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert adjust_p_values([]) == []
    assert adjust_p_values([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    with pytest.raises(DataError, match="between 0 and 1"):
        adjust_p_values([1.2])


def test_a_bootstrap_of_a_mean_agrees_with_its_normal_interval() -> None:
    values = np.random.default_rng(0).normal(size=400)
    found = bootstrap_interval(lambda rows: float(values[rows].mean()), 400, seed=1)
    half = 1.96 * values.std(ddof=1) / 20
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx(
        (found.value - half, found.value + half), abs=0.012
    )
    assert found == bootstrap_interval(lambda rows: float(values[rows].mean()), 400, seed=1)


def test_a_bootstrap_draws_whole_clusters() -> None:
    values = np.repeat(np.arange(8.0), 10)
    clusters = values.astype(int).tolist()

    def mean(rows: NDArray[np.intp]) -> float:
        assert len(rows) == 80
        assert all(count % 10 == 0 for count in np.bincount(rows // 10))
        return float(values[rows].mean())

    clustered = bootstrap_interval(mean, 80, clusters=clusters, draws=200)
    plain = bootstrap_interval(lambda rows: float(values[rows].mean()), 80, draws=200)
    assert clustered.high - clustered.low > 2 * (plain.high - plain.low)
    alone = bootstrap_interval(lambda rows: float(values[rows].mean()), 80, clusters=["a"] * 80)
    assert alone.low == alone.value == alone.high


def build_error(recall: float, false_alarms: float, n: int = 4000) -> ErrorRates:
    return ErrorRates(
        Rate(recall, recall, recall, n), Rate(false_alarms, false_alarms, false_alarms, n)
    )


def test_a_corrected_rate_is_rogan_and_gladens() -> None:
    # Of 1000 answers 300 are refusals; the judge finds 240 of them and 70 others.
    judged = [True] * 310 + [False] * 690
    found = correct_rate(judged, build_error(0.8, 0.1), draws=400)
    assert found.value == pytest.approx(0.3)
    assert found.low < 0.3 < found.high
    plain = measure_rate(judged)
    assert found.high - found.low > plain.high - plain.low
    assert correct_rate([False] * 40, build_error(0.8, 0.1), draws=50).value == 0.0


def test_a_judge_known_from_few_answers_widens_the_interval() -> None:
    judged = [True] * 310 + [False] * 690
    sure, unsure = (
        correct_rate(judged, build_error(0.8, 0.1, n), draws=400) for n in (100_000, 50)
    )
    assert unsure.high - unsure.low > 1.5 * (sure.high - sure.low)


def test_corrected_rates_cover_the_true_rate() -> None:
    rng = np.random.default_rng(3)
    covered = 0
    for seed in range(150):
        recall = rng.binomial(200, 0.8) / 200
        false_alarms = rng.binomial(200, 0.1) / 200
        truth = rng.random(200) < 0.4
        judged = np.where(truth, rng.random(200) < 0.8, rng.random(200) < 0.1)
        error = build_error(recall, false_alarms, 200)
        found = correct_rate(judged.tolist(), error, draws=200, seed=seed)
        covered += found.low <= 0.4 <= found.high
    assert 0.88 <= covered / 150 <= 0.99


def test_a_corrected_difference_undoes_a_judge_that_is_worse_on_one_side() -> None:
    # People: 60 and 30 of 100. The judge finds all of the first and half of the second.
    before = [True] * 60 + [False] * 40
    after = [True] * 15 + [False] * 85
    found = correct_difference(
        before, after, build_error(1.0, 0.0), build_error(0.5, 0.0), draws=300
    )
    assert found.value == pytest.approx(-0.3)
    assert found.low < -0.3 < found.high


def test_corrections_that_cannot_work_say_why() -> None:
    with pytest.raises(DataError, match="no better than chance"):
        correct_rate([True], build_error(0.2, 0.3))
    with pytest.raises(DataError, match="Run both on one list of samples"):
        correct_difference([True], [], build_error(0.8, 0.1), build_error(0.8, 0.1))
    with pytest.raises(DataError, match="at least one sample"):
        bootstrap_interval(lambda _: 0.0, 0)
    with pytest.raises(DataError, match="as many clusters"):
        bootstrap_interval(lambda _: 0.0, 2, clusters=["a"])
