"""Two runs side by side: shared requests are compared in pairs, and pages hold together."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from safebridge.cli.main import main
from safebridge.diagnosis.compare import build_comparison, compare_runs, measure_changes
from safebridge.diagnosis.config import CONDITIONS
from safebridge.errors import DataError

Diagnosis = tuple[Path, dict[str, Any]]


def load(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    return tuple(json.loads((folder / f"{n}.json").read_text()) for n in ("diagnosis", "answers"))


@pytest.fixture
def other(diagnosis: Diagnosis, tmp_path: Path) -> Path:
    """Return a copy of a run in which every harmful picture request is refused."""
    folder = tmp_path / "other"
    shutil.copytree(diagnosis[0], folder)
    summary, answers = load(folder)
    for one in answers:
        if one["is_harmful"]:
            one["answers"]["base"]["picture"]["label"] = "refusal"
        else:
            one["answers"]["base"]["picture"]["label"] = "answer"
    for one in summary["records"]:
        if (one["setting"], one["metric"]) == ("picture", "refusal_rate"):
            one |= {"value": 1.0, "high": 1.0}
    (folder / "diagnosis.json").write_text(json.dumps(summary))
    (folder / "answers.json").write_text(json.dumps(answers))
    return folder


def test_a_run_does_not_differ_from_itself(diagnosis: Diagnosis) -> None:
    summary, answers = load(diagnosis[0])
    changes = measure_changes([summary, summary], [answers, answers])
    assert len(changes) == 2 * len(CONDITIONS)
    assert all(one["change"]["value"] == 0 and one["change"]["p_value"] == 1 for one in changes)


def test_shared_requests_are_compared_in_pairs(
    diagnosis: Diagnosis, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    assert main(["compare", str(diagnosis[0]), str(other), "--out", str(out)]) == 0
    record = json.loads(out.with_suffix(".json").read_text())
    change = next(
        one["change"]
        for one in record["changes"]
        if (one["metric"], one["setting"]) == ("refusal_rate", "picture")
    )
    refused = sum(
        one["answers"]["base"]["picture"]["label"] == "refusal"
        for one in load(diagnosis[0])[1]
        if one["is_harmful"]
    )
    assert (change["value"], change["n"]) == (1 - refused / 8, 8)
    assert "refusal_rate (picture): +" in capsys.readouterr().out
    page = out.read_text()
    for part in ("Verdicts", "other", "data-key=", "angular_gap"):
        assert part in page


def test_requests_that_are_not_shared_have_no_difference(diagnosis: Diagnosis) -> None:
    summary, answers = load(diagnosis[0])
    renamed = [{**one, "id": "x" + one["id"]} for one in answers]
    changes = measure_changes([summary, summary], [answers, renamed])
    assert all(one["change"] is None for one in changes)
    page = build_comparison(("a", "b"), [summary, summary], changes)
    assert "Differences compare the requests that both runs asked." in page


def test_curves_of_models_of_other_depth_stand_in_figures_of_their_own(
    diagnosis: Diagnosis,
) -> None:
    summary, answers = load(diagnosis[0])
    shallow = json.loads(json.dumps(summary))
    for figure in shallow["curves"]:
        for curve in figure["curves"]:
            for name in ("values", "low", "high", "layers"):
                curve[name] = curve[name][:-1]
    changes = measure_changes([summary, summary], [answers, answers])
    same = build_comparison(("a", "b"), [summary, summary], changes)
    apart = build_comparison(("a", "b"), [summary, shallow], changes)
    assert 'data-key="angular_gap_1"' not in same
    assert 'data-key="angular_gap_1"' in apart


def test_what_is_no_diagnosis_says_what_to_do(
    diagnosis: Diagnosis, other: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="`safebridge diagnose` wrote"):
        compare_runs(diagnosis[0], tmp_path, tmp_path / "page.html")
    with pytest.raises(DataError, match="Choose another --out"):
        compare_runs(diagnosis[0], other, tmp_path / "nowhere" / "page.html")
    (other / "diagnosis.json").write_text('{"format": 0}')
    with pytest.raises(DataError, match="again with this one"):
        compare_runs(diagnosis[0], other, tmp_path / "page.html")
