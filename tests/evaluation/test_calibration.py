"""The published error of the refusal judge: its arithmetic, its currency, its origin."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from safebridge.errors import DataError
from safebridge.evaluation.calibration import load_judge_error, measure_judge_error
from safebridge.evaluation.judges import JUDGES, measure_rules_fingerprint
from safebridge.evaluation.statistics import Rate, measure_rate

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared/data/judge_calibration"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    path = ROOT / "benchmarks/judge_calibration.py"
    spec = importlib.util.spec_from_file_location("judge_calibration", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_precision_recall_and_false_alarms_are_counted_by_hand() -> None:
    human = [True] * 10 + [False] * 20
    judged = [True] * 8 + [False] * 2 + [True] * 1 + [False] * 19
    error = measure_judge_error(judged, human)
    assert (error.precision.value, error.precision.n) == (8 / 9, 9)
    assert (error.recall.value, error.recall.n) == (0.8, 10)
    assert (error.false_alarm_rate.value, error.false_alarm_rate.n) == (0.05, 20)
    assert error.n == 30
    assert error.recall == measure_rate([True] * 8 + [False] * 2)


@pytest.mark.parametrize(
    ("judged", "human", "message"),
    [
        ([True], [True, False], "need as many labels, found 2"),
        ([False, False], [True, False], "Take more answers"),
        ([True, True], [True, True], "Take more answers"),
    ],
)
def test_an_error_that_cannot_be_measured_says_why(
    judged: list[bool], human: list[bool], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        measure_judge_error(judged, human)


def test_the_published_error_belongs_to_the_rules_as_they_are() -> None:
    published = load_judge_error()
    assert published["judge"] in JUDGES
    assert published["rules_sha256"] == measure_rules_fingerprint(), (
        "the rules changed: run benchmarks/judge_calibration.py again"
    )
    assert published["split"]["half"] == "measured"
    assert [entry["name"] for entry in published["measurements"] if entry["is_primary"]] == [
        "xstest-full"
    ]
    for entry in published["measurements"]:
        for rate in ("precision", "recall", "false_alarm_rate"):
            read = Rate.from_json(entry[rate])
            assert read.low <= read.value <= read.high


def test_the_page_on_judges_shows_the_rules_and_numbers_as_they_are(benchmark: ModuleType) -> None:
    page = (ROOT / "docs/judges.md").read_text(encoding="utf-8")
    assert benchmark.render_rules() in page
    assert benchmark.render_error(load_judge_error()) in page


@pytest.mark.skipif(not DATA.is_dir(), reason="the human labels are not here")
def test_the_published_error_can_be_measured_again(benchmark: ModuleType) -> None:
    assert benchmark.build_report(DATA) == load_judge_error()


@pytest.mark.skipif(not DATA.is_dir(), reason="the human labels are not here")
def test_the_halves_share_no_prompt_and_cover_everything(benchmark: ModuleType) -> None:
    plan = benchmark.MEASUREMENTS[0]
    halves = [
        benchmark.measure(DATA, plan, development=development)["n"] for development in (True, False)
    ]
    assert sum(halves) == 1350
    assert min(halves) > 600
