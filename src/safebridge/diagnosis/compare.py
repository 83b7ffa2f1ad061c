"""Lays two diagnoses side by side: the same numbers, their differences, joint curves."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from safebridge.diagnosis.charts import draw_bar_rows, draw_curve_figure
from safebridge.diagnosis.config import CONDITIONS
from safebridge.diagnosis.page import build_page, write_keys, write_table
from safebridge.diagnosis.report import (
    curve_data,
    read_curves,
    read_records,
    write_verdict_cards,
)
from safebridge.diagnosis.results import CurveFigure, Record, find_record
from safebridge.diagnosis.tables import read_json, write_json
from safebridge.errors import DataError
from safebridge.evaluation.statistics import Difference, measure_difference

__all__ = ["build_comparison", "compare_runs", "measure_changes"]

Summary = Mapping[str, Any]
Answers = Sequence[Mapping[str, Any]]

_MOST_CURVES = 6  # as many as there are colours

_METRICS = (
    ("refusal_rate", True, "Harmful requests refused"),
    ("over_refusal_rate", False, "Harmless requests refused"),
)


def compare_runs(first: Path, second: Path, out: Path) -> dict[str, Any]:
    """Compare two folders that `safebridge diagnose` wrote, and write a page and its numbers.

    Args:
        first: The run that stands on the left.
        second: The run that stands on the right.
        out: The HTML file; its numbers go beside it as JSON.

    Returns:
        The contents of the JSON file.

    Raises:
        DataError: If a folder holds no diagnosis, or the page cannot be written.
    """
    runs = [read_json(folder / "diagnosis.json") for folder in (first, second)]
    answers = [read_json(folder / "answers.json") for folder in (first, second)]
    names = _name_runs(first, second)
    for folder, run in zip((first, second), runs, strict=True):
        if not isinstance(run, dict) or run.get("format") != 1:
            raise DataError(
                f"{folder / 'diagnosis.json'} is of another version. Run `safebridge diagnose` "
                "again with this one."
            )
    numbers = measure_changes(runs, answers)
    page = build_comparison(names, runs, numbers)
    record = {"first": str(first), "second": str(second), "changes": numbers}
    try:
        out.write_text(page, encoding="utf-8")
        write_json(out.with_suffix(".json"), record)
    except OSError as error:
        raise DataError(
            f"cannot write {out}: {error.strerror}. Choose another --out, e.g. compare.html."
        ) from error
    return record


def measure_changes(runs: Sequence[Summary], answers: Sequence[Answers]) -> list[dict[str, Any]]:
    """Compare the base models of two runs; requests that both asked are compared in pairs.

    Args:
        runs: Two contents of `diagnosis.json`.
        answers: Two contents of `answers.json`.

    Returns:
        For each metric and condition both rates, and the difference second minus first over
        the requests that the runs share; None if they share none.
    """
    records = [read_records(run) for run in runs]
    changes = []
    for metric, is_harmful, _ in _METRICS:
        for condition in CONDITIONS:
            sides = [find_record(own, "base", condition, metric) for own in records]
            if not any(sides):  # neither model can be asked like that
                continue
            change = _pair_up(answers, condition, is_harmful=is_harmful)
            changes.append(
                {
                    "metric": metric,
                    "setting": condition,
                    "first": None if sides[0] is None else sides[0].to_json(),
                    "second": None if sides[1] is None else sides[1].to_json(),
                    "change": None if change is None else change.to_json(),
                }
            )
    return changes


def build_comparison(
    names: tuple[str, str], runs: Sequence[Summary], changes: Sequence[Mapping[str, Any]]
) -> str:
    """Return the page as HTML; every text from outside is escaped.

    Args:
        names: What the two runs are called; different.
        runs: Two contents of `diagnosis.json`.
        changes: What `measure_changes` returned.
    """
    figures = _join_figures(names, runs)
    verdicts = "".join(
        f"<div><h3>{escape(name)}: {escape(run['model']['name'])}</h3>"
        f"{write_verdict_cards(run['verdict'])}</div>"
        for name, run in zip(names, runs, strict=True)
    )
    body = "".join(
        (
            "<h2>Verdicts</h2>",
            f'<div class="pair">{verdicts}</div>',
            "<h2>Whether</h2>",
            _write_bars(names, runs),
            _write_changes(names, changes),
            "<h2>Where and why</h2>" if figures else "",
            *(draw_curve_figure(one) for one in figures),
        )
    )
    return build_page(
        title=f"{names[0]} and {names[1]}",
        lead="Two diagnoses side by side. Differences compare the requests that both runs asked.",
        body=body,
        data={"curves": {one.key: curve_data(one) for one in figures}, "sites": {}},
    )


def _name_runs(first: Path, second: Path) -> tuple[str, str]:
    """Call the runs by their folders, by as much of the path as tells them apart."""
    one, other = first.resolve(), second.resolve()
    if one.name != other.name:
        return one.name, other.name
    if one == other:
        return f"{one.name} (first)", f"{one.name} (second)"
    return str(first), str(second)


def _pair_up(answers: Sequence[Answers], condition: str, *, is_harmful: bool) -> Difference | None:
    sides = [
        {
            (one["id"], one["requests"][condition]["prompt"]): one
            for one in own
            if one["is_harmful"] == is_harmful and condition in one["answers"]["base"]
        }
        for own in answers
    ]
    shared = [key for key in sides[0] if key in sides[1]]
    if not shared:
        return None
    outcomes = [
        [own[key]["answers"]["base"][condition]["label"] == "refusal" for key in shared]
        for own in sides
    ]
    clusters = [sides[0][key]["concept"] for key in shared]
    return measure_difference(outcomes[0], outcomes[1], clusters=clusters)


def _write_bars(names: tuple[str, str], runs: Sequence[Summary]) -> str:
    records = [read_records(run) for run in runs]
    parts = []
    for metric, _, title in _METRICS:
        rows: list[tuple[str, str, list[Record | None]]] = [
            (name, "", [find_record(own, "base", name, metric) for own in records])
            for name in CONDITIONS
            if any(find_record(own, "base", name, metric) for own in records)
        ]
        parts.append(
            f'<div class="card"><h3>{title}</h3>{write_keys(names)}{draw_bar_rows(rows, names)}'
            "</div>"
        )
    return "".join(parts)


def _write_changes(names: tuple[str, str], changes: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for one in changes:
        change = one["change"]
        title = next(text for metric, _, text in _METRICS if metric == one["metric"])
        rows.append(
            [
                f"{escape(one['setting'])}<small>{title.lower()}</small>",
                *(_share(one[side]) for side in ("first", "second")),
                "\u2013" if change is None else _points(change),
                "\u2013" if change is None else f"{change['p_value']:.2g}",
            ]
        )
    table = write_table(("request", *names, "change", "p"), rows)
    return (
        f'<div class="card">{table}<p class="soft">Change: second minus first in points, with its '
        "95 % interval; p: exact McNemar test of each row by itself.</p></div>"
    )


def _share(record: Mapping[str, Any] | None) -> str:
    if record is None:
        return "\u2013"
    return f"{100 * record['value']:.0f}\u00a0%<small>n = {record['n']}</small>"


def _points(change: Mapping[str, Any]) -> str:
    low, value, high = (f"{100 * change[key]:+.0f}" for key in ("low", "value", "high"))
    return f"{value}<small>{low} to {high}, n = {change['n']}</small>"


def _join_figures(names: tuple[str, str], runs: Sequence[Summary]) -> list[CurveFigure]:
    """Put the base curves of both runs into one figure, or into two where they do not fit."""
    own, other = (
        {figure.key: figure for figure in map(_only_base, read_curves(run)) if figure.curves}
        for run in runs
    )
    figures = []
    for key, figure in own.items():
        if key not in other:
            continue
        both = [
            tuple(replace(curve, name=f"{name}: {curve.name}") for curve in one.curves)
            for name, one in zip(names, (figure, other[key]), strict=True)
        ]
        joined = both[0] + both[1]
        is_one = len(joined) <= _MOST_CURVES and len({curve.layers for curve in joined}) == 1
        for number, curves in enumerate([joined] if is_one else both):
            variants = ("base",) * len(curves)
            figures.append(
                replace(figure, key=f"{key}_{number}", curves=curves, variants=variants, band=None)
            )
    return figures


def _only_base(figure: CurveFigure) -> CurveFigure:
    pairs = zip(figure.curves, figure.variants, strict=True)
    curves = tuple(curve for curve, variant in pairs if variant == "base")
    return replace(figure, curves=curves, variants=("base",) * len(curves))
