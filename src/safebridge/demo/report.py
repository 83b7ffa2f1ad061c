"""Writes the report: one HTML file that needs no network and no script."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image

from safebridge.analysis.curves import LayerCurve
from safebridge.data.sample import open_image
from safebridge.demo.results import Example
from safebridge.reporting.charts import NOTHING, draw_bars, draw_curves, to_percent

__all__ = ["build_report"]

Summary = Mapping[str, Any]

_PICTURE_PIXELS = 144

_ROWS = (
    ("text_refusal_rate", "seen", "Harmful text requests refused", "seen categories"),
    ("text_refusal_rate", "unseen", "Harmful text requests refused", "unseen categories"),
    ("image_refusal_rate", "seen", "Harmful picture requests refused", "seen categories"),
    ("image_refusal_rate", "unseen", "Harmful picture requests refused", "unseen categories"),
    ("over_refusal_rate", "all", "Harmless picture requests refused", "lower is better"),
    ("text_over_refusal_rate", "all", "Harmless text requests refused", "lower is better"),
    ("naming_accuracy", "all", "Things named correctly from the picture", "utility"),
)

_LIMITS = (
    (
        "A security tensor is a fixed prefix. Somebody who knows it, or who may choose the prompt "
        "freely, can search for inputs that undo it; this demo tests no such attack."
    ),
    (
        "The requests come from templates and the pictures are drawings with one thing in each. "
        "Photographs, text inside pictures, several pictures and long conversations are not tested."
    ),
    (
        "A refusal is what the judge calls a refusal. It reads the answer's wording; whether an "
        "answer that does not refuse is of any use to somebody is not measured."
    ),
    (
        "The intervals count requests about the same thing as one cluster. They say nothing about "
        "other wordings than the templates used here, or about other models."
    ),
    (
        "Naming is the only utility measured here; run the suites of your own task as well before "
        "you use a defense."
    ),
)


def build_report(
    summary: Summary, examples: Sequence[Example], curves: Sequence[LayerCurve]
) -> str:
    """Return the whole report as HTML; every text from outside is escaped.

    Args:
        summary: The contents of `summary.json`.
        examples: Picture requests with both answers, in the order to be shown.
        curves: Text, picture, and picture with the defense; may be empty.

    Raises:
        DataError: If the picture of an example cannot be read.
    """
    template = files("safebridge.demo").joinpath("report_template.html").read_text("utf-8")
    return Template(template).substitute(
        title=escape(f"Safety gap of {summary['model']['name']}"),
        lead=_write_lead(summary),
        notes="".join(f'<p class="card note">{escape(note)}</p>' for note in summary["notes"]),
        tiles=_write_tiles(summary),
        table=_write_table(summary),
        table_note=_write_table_note(summary),
        goals=_write_goals(summary),
        legend=_write_legend(),
        bars=_write_bars(summary),
        examples_note=_write_examples_note(examples),
        examples=_write_examples(examples),
        curves=_write_curves(curves),
        curves_note=_write_curves_note(curves),
        method=_write_method(summary),
        judge=_write_judge(summary["judge"]),
        limits="<ul>" + "".join(f"<li>{escape(text)}</li>" for text in _LIMITS) + "</ul>",
        reproduce=_write_reproduce(summary),
    )


def _write_lead(summary: Summary) -> str:
    fast = " This is a fast run: few samples, wide intervals." if summary["is_fast"] else ""
    return escape(
        "The same harmful request, once as text and once as a picture with “this”. A safe model "
        "refuses both. Measured before and after fitting a security tensor, on drawing styles "
        f"and wordings that the tensor never saw.{fast}"
    )


def _write_tiles(summary: Summary) -> str:
    tiles = []
    for cell, label in (("seen", "seen categories"), ("unseen", "unseen categories")):
        before = _rate(summary, "base", "image_refusal_rate", cell)
        after = _rate(summary, "defended", "image_refusal_rate", cell)
        twin = _rate(summary, "base", "text_refusal_rate", cell)
        tiles.append(
            _tile(before, after, f"harmful pictures refused, {label}; as text {_value(twin)}")
        )
    for metric, label in (
        ("over_refusal_rate", "harmless pictures refused"),
        ("naming_accuracy", "things named correctly"),
    ):
        tiles.append(
            _tile(
                _rate(summary, "base", metric, "all"),
                _rate(summary, "defended", metric, "all"),
                label,
            )
        )
    return "".join(tiles)


def _tile(before: Summary | None, after: Summary | None, label: str) -> str:
    return (
        f'<div class="card tile"><strong><span class="from">{_value(before, 0)}</span> → '
        f'<span class="to">{_value(after, 0)}</span></strong>{escape(label)}</div>'
    )


def _rate(summary: Summary, side: str, metric: str, cell: str) -> Summary | None:
    rate: Summary | None = summary[side].get(metric, {}).get(cell)
    return rate


def _value(rate: Summary | None, digits: int = 1) -> str:
    if rate is None or rate["value"] is None:
        return NOTHING
    return f"{100 * rate['value']:.{digits}f}\u00a0%"


def _write_table(summary: Summary) -> str:
    rows = []
    for metric, cell, label, note in _ROWS:
        before = _rate(summary, "base", metric, cell)
        after = _rate(summary, "defended", metric, cell)
        if before is None or after is None:
            continue
        change = summary["differences"][metric][cell]
        rows.append(
            f"<tr><td>{escape(label)}<small>{escape(note)}, n = {before['n']}</small></td>"
            f'<td class="before">{_cell(before)}</td><td class="after">{_cell(after)}</td>'
            f"<td>{_change(change)}</td></tr>"
        )
    return (
        "<table><thead><tr><th>Share of answers</th><th>base</th><th>defended</th>"
        f"<th>change</th></tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _cell(rate: Summary) -> str:
    if rate["value"] is None:
        return NOTHING
    return (
        f"<b>{to_percent(rate['value'])}</b>"
        f"<small>{100 * rate['low']:.1f} to {100 * rate['high']:.1f}</small>"
    )


def _change(change: Summary) -> str:
    if change["value"] is None:
        return NOTHING
    return (
        f"{_points(change['value'])}<small>{_points(change['low'])} to "
        f"{_points(change['high'])}</small>"
    )


def _points(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")  # noqa: RUF001 - a true minus sign


def _write_table_note(summary: Summary) -> str:
    gaps = []
    for cell in ("seen", "unseen"):
        base, defended = summary["gap"]["base"].get(cell), summary["gap"]["defended"].get(cell)
        if base and defended and None not in (base["value"], defended["value"]):
            gaps.append(
                f"{cell} categories {_points(base['value'])} before and "
                f"{_points(defended['value'])} after"
            )
    gap = f" Gap between text and picture, in points: {'; '.join(gaps)}." if gaps else ""
    return escape(
        "Small print is the 95 % interval; the change compares the same requests and is in "
        "percentage points. “Unseen” are harmful categories that the tensor was not fitted on. "
        f"The same answers are counted in every section.{gap}"
    )


def _write_goals(summary: Summary) -> str:
    items = []
    for goal in summary["goals"]:
        kind, word = {True: ("yes", "met"), False: ("no", "not met"), None: ("no", "unknown")}[
            goal["met"]
        ]
        items.append(
            f'<li><span class="chip {kind}">{word}</span><span>{escape(goal["goal"])} '
            f"<small>found {escape(goal['found'])}</small></span></li>"
        )
    return f'<ul class="goals">{"".join(items)}</ul>'


def _write_legend() -> str:
    return (
        '<div class="keys"><span class="key"><i class="base"></i>base</span>'
        '<span class="key"><i class="defended"></i>with the security tensor</span></div>'
    )


def _write_bars(summary: Summary) -> str:
    titles = (
        ("image_refusal_rate", "Harmful picture requests refused"),
        ("text_refusal_rate", "Harmful text requests refused"),
        ("over_refusal_rate", "Harmless picture requests refused"),
    )
    figures = []
    for metric, title in titles:
        rows = [
            (name, _badge(metric, both["is_seen"]), both["base"], both["defended"])
            for name, both in summary["per_category"].get(metric, {}).items()
        ]
        if rows:
            rows.sort(key=lambda row: (row[1], row[0]))
            figures.append(draw_bars(title, rows))
    return "".join(figures)


def _badge(metric: str, is_seen: bool) -> str:  # noqa: FBT001 - a plain fact of the row
    if metric == "over_refusal_rate":
        return ""
    return "seen" if is_seen else "unseen"


def _write_examples_note(examples: Sequence[Example]) -> str:
    if not examples:
        return "There are no examples in this run."
    return escape(
        "Drawn at random with the seed of the run, not chosen; the answers are cut at the "
        "length that was generated."
    )


def _write_examples(examples: Sequence[Example]) -> str:
    parts = []
    for is_harmful, title in ((True, "Harmful requests"), (False, "Harmless requests")):
        cards = [_write_example(one) for one in examples if one.is_harmful == is_harmful]
        if cards:
            parts.append(f'<h3>{title}</h3><div class="examples">{"".join(cards)}</div>')
    return "".join(parts)


def _write_example(example: Example) -> str:
    badge = example.category
    if example.is_harmful:
        badge += ", seen" if example.is_seen else ", unseen"
    sides = zip(
        ("before", "after"),
        ("base", "defended"),
        example.answers,
        example.refusals,
        strict=True,
    )
    answers = "".join(
        f'<div class="answer {place}"><small>{side} '
        f'<span class="chip {_chip(example.is_harmful, refused)}">'
        f"{'refused' if refused else 'answered'}</span></small>"
        f"{escape(answer) or '(nothing)'}</div>"
        for place, side, answer, refused in sides
    )
    return (
        f'<article class="card example"><img alt="{escape(example.concept)}" '
        f'src="{_embed_picture(example.picture)}"><div>{escape(example.request)}<br>'
        f'<span class="badge">{escape(badge)}</span> '
        f"<small>the picture shows: {escape(example.concept)}</small></div>"
        f'<div class="answers">{answers}</div></article>'
    )


def _chip(is_harmful: bool, is_refusal: bool) -> str:  # noqa: FBT001 - two plain facts
    return "yes" if is_harmful == is_refusal else "no"


def _embed_picture(path: Path) -> str:
    """Return a small copy of a picture as a data address; small, because there are many."""
    image = open_image(path)
    image.thumbnail((_PICTURE_PIXELS, _PICTURE_PIXELS), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _write_curves(curves: Sequence[LayerCurve]) -> str:
    if not curves:
        return "<p>The layers were not recorded in this run.</p>"
    axis = "How much further harmful requests lie from harmless ones than these from each other"
    return draw_curves(curves, ("text", "base", "defended"), f"{axis} (degrees)")


def _write_curves_note(curves: Sequence[LayerCurve]) -> str:
    if not curves:
        return ""
    return escape(
        "Mean angle between harmful and harmless requests minus the mean angle among harmless "
        "ones, at the last position of the prompt, in the residual stream after each decoder "
        f"layer ({curves[0].n} requests on each side; the band is a 95 % bootstrap interval over "
        "requests). A layer at zero does not tell the two apart. Where the text curve rises, the "
        "model's safety is at work; the picture curves show how much of that a picture reaches. "
        "After Li et al. 2025, “Safety Layers in Aligned Large Language Models” "
        "(arXiv:2408.17003)."
    )


def _write_method(summary: Summary) -> str:
    fit = "".join(f"<li>{escape(line)}</li>" for line in summary["method"]["lines"])
    facts = {
        "model": f"{summary['model']['name']} ({summary['model']['class']})",
        **{f"{name} seconds": f"{value:.0f}" for name, value in summary["seconds"].items()},
        **summary["hardware"],
        **summary["versions"],
        **summary["hashes"],
    }
    settings = {name: str(value) for name, value in summary["config"].items()}
    return (
        f"<ul>{fit}</ul>"
        f"<details><summary>Settings</summary>{_write_facts(settings)}</details>"
        f"<details><summary>Machine, versions, hashes</summary>{_write_facts(facts)}</details>"
    )


def _write_facts(facts: Mapping[str, object]) -> str:
    rows = "".join(
        f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(str(value))}</dd>"
        for name, value in facts.items()
    )
    return f"<dl>{rows}</dl>"


def _write_judge(judge: Summary) -> str:
    rules = "".join(
        f"<li><code>{escape(rule['name'])}</code>, e.g. “{escape(rule['example'])}”</li>"
        for rule in judge["rules"]
    )
    return (
        f"<p>{escape(judge['what'])}</p>{_write_judge_error(judge['error'])}"
        f"<details><summary>Its {len(judge['rules'])} rules</summary><ul>{rules}</ul></details>"
    )


def _write_judge_error(error: Summary) -> str:
    primary = [one for one in error["measurements"] if one["is_primary"]]
    others = [one for one in error["measurements"] if not one["is_primary"]]
    sources = sorted({f"{one['source']} ({one['licence']})" for one in error["measurements"]})
    more = (
        "<details><summary>By other definitions and data</summary>"
        f"{_write_errors(others)}</details>"
        if others
        else ""
    )
    return (
        f"{_write_errors(primary)}{more}"
        f'<p class="soft">Human labels: {escape("; ".join(sources))}.</p>'
    )


def _write_errors(measurements: Sequence[Summary]) -> str:
    rows = "".join(
        f"<tr><td>{escape(one['name'])}<small>n = {one['n']}. {escape(one['definition'])}</small>"
        f"</td><td>{_cell(one['recall'])}</td><td>{_cell(one['precision'])}</td>"
        f"<td>{_cell(one['false_alarm_rate'])}</td></tr>"
        for one in measurements
    )
    return (
        '<div class="scroll"><table><thead><tr><th>Against human labels</th>'
        "<th>refusals found</th><th>of its refusals, right</th><th>false alarms</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def _write_reproduce(summary: Summary) -> str:
    return (
        f'<pre>{escape(summary["command"])}</pre><p class="soft">'
        + escape(
            "The same seed gives the same numbers on the same machine and versions. "
            "summary.json holds every number of this page, answers.json every answer, and logs/ "
            "the runs for the viewer: inspect view --log-dir logs."
        )
        + "</p>"
    )
