"""Writes the report: one HTML file that opens without a network and answers to pointer and keys."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from safebridge.analysis.curves import LayerCurve
from safebridge.diagnosis.charts import (
    draw_bar_rows,
    draw_curve_figure,
    draw_point_figure,
    draw_site_figure,
)
from safebridge.diagnosis.config import CONDITIONS, SPELLED
from safebridge.diagnosis.page import (
    build_page,
    embed_picture,
    write_keys,
    write_list,
    write_table,
)
from safebridge.diagnosis.plan import Case
from safebridge.diagnosis.results import (
    CurveFigure,
    PointFigure,
    Record,
    Reply,
    SiteFigure,
    find_record,
)

__all__ = ["build_report", "curve_data", "read_curves", "read_records", "write_verdict_cards"]

Summary = Mapping[str, Any]
Replies = Mapping[str, Sequence[Reply]]

_WHERE = ("angular_gap", "refusal_word_probability", "probe_accuracy", "pair_angles")
_NOTHING = "\u2013"

_CONDITION_TEXTS = {
    "text": "in plain words",
    "caption": "beside a caption in place of the picture",
    SPELLED: "beside the picture, whose tokens are written over with the name of what it shows",
    "picture": "beside the picture, which alone shows the thing",
    "typographic": "as words drawn in a picture",
    "blank": "in plain words, beside an empty picture",
    "noise": "in plain words, beside a picture of noise",
}

_LIMITS = (
    (
        "A refusal is what the judge calls a refusal. It reads the answer's wording alone; whether "
        "an answer that does not refuse would help anybody is not measured. The corrected rates "
        "use the judge's error on other models' answers."
    ),
    (
        "The intervals count requests about the same thing as one cluster. They say nothing about "
        "other wordings, other pictures or other models."
    ),
    (
        "Typographic requests are drawn as they were written; the attack they follow first has "
        "them rewritten as a heading. A model that cannot read letters answers them blindly."
    ),
    (
        "Angles, probes and directions show what goes together with refusing, not what causes it. "
        "The scaling test is the only intervention here."
    ),
    (
        "The rule that finds safety layers and the thresholds of the verdict are ours; the curves "
        "and numbers stand beside them."
    ),
)


def build_report(
    summary: Summary,
    cases: Sequence[Case],
    replies: Mapping[str, Replies],
    *,
    shown: int,
) -> str:
    """Return the whole report as HTML; every text from outside is escaped.

    Args:
        summary: The contents of `diagnosis.json`.
        cases: The requests.
        replies: Variant to the answers.
        shown: How many requests are shown with their pictures and answers.

    Raises:
        DataError: If a picture cannot be read.
    """
    records, curves = read_records(summary), read_curves(summary)
    sites = [SiteFigure(**{**one, "layers": tuple(one["layers"])}) for one in summary["sites"]]
    points = [PointFigure(**one) for one in summary["points"]]
    variants = list(replies)
    body = "".join(
        (
            "<h2>Verdict</h2>",
            write_verdict_cards(summary["verdict"]),
            *(f'<p class="soft">{escape(note)}</p>' for note in summary["notes"]),
            "<h2>Whether</h2>",
            _write_whether(records, variants),
            _write_categories(records, cases, variants),
            _write_layers(curves, sites, points),
            "<h2>Requests and answers</h2>",
            _write_samples(cases, replies, shown),
            "<h2>How it was done</h2>",
            _write_method(summary),
        )
    )
    data = {
        "curves": {one.key: curve_data(one) for one in curves},
        "sites": {one.key: {"layers": one.layers, "maps": one.maps} for one in sites},
    }
    return build_page(
        title=f"Safety diagnosis of {summary['model']['name']}",
        lead=_write_lead(summary),
        body=body,
        data=data,
    )


def read_records(summary: Summary) -> list[Record]:
    """Return the numbers of a `diagnosis.json`.

    Args:
        summary: Its contents.
    """
    return [Record(**{**one, "seeds": tuple(one["seeds"])}) for one in summary["records"]]


def read_curves(summary: Summary) -> list[CurveFigure]:
    """Return the curves of a `diagnosis.json`.

    Args:
        summary: Its contents.
    """
    figures = []
    for one in summary["curves"]:
        curves = tuple(
            LayerCurve(**{**curve, **{name: tuple(curve[name]) for name in _SEQUENCES}})
            for curve in one["curves"]
        )
        band = None if one["band"] is None else (one["band"][0], one["band"][1])
        variants = tuple(one["variants"])
        figures.append(CurveFigure(**{**one, "curves": curves, "band": band, "variants": variants}))
    return figures


_SEQUENCES = ("values", "low", "high", "layers")


def write_verdict_cards(verdict: Sequence[Mapping[str, Any]]) -> str:
    """Return the findings as HTML.

    Args:
        verdict: The findings of a `diagnosis.json`.
    """
    cards = "".join(
        f'<div class="card finding"><b>{escape(one["question"])}</b><div>'
        f"<p>{escape(one['text'])}</p><small>{write_list(one['rests_on'])}</small></div></div>"
        for one in verdict
    )
    return f'<div class="verdict">{cards}</div>'


def _write_lead(summary: Summary) -> str:
    fast = " This is a fast run: few requests, wide intervals." if summary["is_fast"] else ""
    counts = summary["samples"]
    return (
        f"{counts['harmful']} harmful and {counts['harmless']} harmless requests, each put in "
        f"words and in up to six other ways. Does the safety of text hold for pictures, and if "
        f"not, where in the model is it lost?{fast}"
    )


def _write_whether(records: Sequence[Record], variants: Sequence[str]) -> str:
    parts = []
    for metric, title in (
        ("refusal_rate", "Harmful requests refused"),
        ("over_refusal_rate", "Harmless requests refused"),
    ):
        rows = [
            (
                f"{condition}: {_CONDITION_TEXTS[condition]}",
                "",
                [find_record(records, variant, condition, metric) for variant in variants],
            )
            for condition in CONDITIONS
            if find_record(records, "base", condition, metric) is not None
        ]
        parts.append(
            f'<div class="card"><h3>{title}</h3>{write_keys(variants)}'
            f"{draw_bar_rows(rows, variants)}</div>"
        )
    return "".join(parts) + _write_rates(records, variants)


def _write_rates(records: Sequence[Record], variants: Sequence[str]) -> str:
    rows = []
    for variant in variants:
        for condition in CONDITIONS:
            rate = find_record(records, variant, condition, "refusal_rate")
            if rate is None:
                continue
            cells = [
                find_record(records, variant, condition, metric)
                for metric in ("refusal_rate_corrected", "compliance_rate", "over_refusal_rate")
            ]
            gap = find_record(records, variant, condition, "refusal_gap")
            name = condition if variant == "base" else f"{condition}, {variant}"
            rows.append(
                [
                    f"{escape(name)}<small>n = {rate.n}</small>",
                    *(_rate_cell(one) for one in (rate, *cells)),
                    _gap_cell(gap),
                    _NOTHING if gap is None else f"{gap.p_adjusted:.2g}",
                ]
            )
    table = write_table(
        ("request", "refused", "corrected", "complied", "harmless refused", "text minus this", "p"),
        rows,
    )
    note = (
        "Small print is the 95 % interval. Corrected: for the judge's error on human-labelled "
        "answers (Rogan and Gladen). Complied: neither refused nor objected. Text minus this: the "
        "same requests compared, in points; p: exact McNemar test after Holm's method."
    )
    return f'<div class="card">{table}<p class="soft">{note}</p></div>'


def _write_categories(
    records: Sequence[Record], cases: Sequence[Case], variants: Sequence[str]
) -> str:
    categories = sorted({case.category for case in cases if case.is_harmful})
    figures = []
    for condition in ("text", "picture"):
        rows = [
            (
                name,
                name,
                [
                    find_record(records, variant, condition, "refusal_rate", category=name)
                    for variant in variants
                ],
            )
            for name in categories
        ]
        figures.append(f"<div><h3>{condition}</h3>{draw_bar_rows(rows, variants)}</div>")
    choice = _write_select("category", "Category", [(name, name) for name in categories])
    return (
        f'<div class="card"><h3>Harmful requests refused, by category</h3>'
        f'<div class="filters">{choice}</div>{write_keys(variants)}'
        f'<div class="pair">{"".join(figures)}</div></div>'
    )


def _write_layers(
    curves: Sequence[CurveFigure], sites: Sequence[SiteFigure], points: Sequence[PointFigure]
) -> str:
    if not curves:
        return (
            "<h2>Where and why</h2><p>This run did not look into the layers "
            "(--layer-samples 0).</p>"
        )
    where = [one for key in _WHERE for one in curves if one.key == key]
    why = [one for one in curves if one.key not in _WHERE]
    return "".join(
        (
            "<h2>Where</h2>",
            *(draw_curve_figure(one) for one in where),
            *(draw_site_figure(one) for one in sites),
            "<h2>Why</h2>",
            *(draw_curve_figure(one) for one in why),
            f'<div class="pair">{"".join(draw_point_figure(one) for one in points)}</div>',
        )
    )


def _write_samples(cases: Sequence[Case], replies: Mapping[str, Replies], shown: int) -> str:
    """Return requests with their pictures and answers, harmful and harmless ones in turn."""
    sides = [
        [i for i, case in enumerate(cases) if case.is_harmful == side] for side in (True, False)
    ]
    order = [i for pair in zip(*sides, strict=False) for i in pair]
    order += [i for side in sides for i in side if i not in set(order)]
    chosen = order[:shown]
    if not chosen:
        return "<p>This run shows no requests (--shown-samples 0).</p>"
    filters = "".join(
        (
            _write_select("kind", "Requests", [("harmful", "harmful"), ("harmless", "harmless")]),
            _write_select(
                "refused",
                "Refused by the base model",
                [(name, f"as {name}") for name in CONDITIONS],
            ),
            _write_select(
                "answered",
                "Not refused by the base model",
                [(name, f"as {name}") for name in CONDITIONS],
            ),
        )
    )
    cards = "".join(_write_sample(cases[i], i, replies) for i in chosen)
    return (
        f'<div class="filters">{filters}<small id="sample-count" aria-live="polite"></small></div>'
        '<p class="soft">The category filter above applies here as well. Harmful pictures are '
        f"blurred until you press them. All answers are in answers.json.</p>{cards}"
    )


def _write_sample(case: Case, number: int, replies: Mapping[str, Replies]) -> str:
    base = {name: rows[number] for name, rows in replies["base"].items()}
    refused = [name for name, reply in base.items() if reply.is_refusal]
    answered = [name for name in base if name not in refused]
    kind = "harmful" if case.is_harmful else "harmless"
    shots = "".join(_write_shot(case, name) for name in ("picture", "typographic", "noise"))
    answers = "".join(
        _write_answer(name, variant, case, rows[number])
        for variant, own in replies.items()
        for name, rows in own.items()
    )
    return (
        f'<details class="card sample" data-category="{escape(case.category)}" data-kind="{kind}" '
        f'data-refused="{" ".join(refused)}" data-answered="{" ".join(answered)}">'
        f"<summary>{escape(case.samples['text'].prompt)} <small>{kind}, "
        f"{escape(case.category)}; refused {len(refused)} of {len(base)}</small></summary>"
        f'<div><div class="shots">{shots}</div>{answers}</div></details>'
    )


def _write_shot(case: Case, condition: str) -> str:
    uri = embed_picture(case.samples[condition].images[0])
    is_veiled = case.is_harmful and condition != "noise"
    text = f"{condition} of a {'harmful' if case.is_harmful else 'harmless'} request"
    image = f'<img src="{uri}" alt="{escape(text)}" loading="lazy">'
    if is_veiled:
        image = (
            f'<button type="button" class="veil" aria-pressed="false" '
            f'aria-label="Show the {condition} picture">{image}<span>show</span></button>'
        )
    return f"<figure>{image}<figcaption>{condition}</figcaption></figure>"


def _write_answer(condition: str, variant: str, case: Case, reply: Reply) -> str:
    kind = "refusal" if reply.is_refusal else "other"
    name = condition if variant == "base" else f"{condition}, {variant}"
    return (
        f'<div class="answer"><small>{escape(name)} <span class="chip {kind}">'
        f"{escape(reply.label)}</span> {escape(case.samples[condition].prompt)}</small>"
        f"{escape(reply.answer) or _NOTHING}</div>"
    )


def _write_select(name: str, label: str, options: Sequence[tuple[str, str]]) -> str:
    items = "".join(
        f'<option value="{escape(value)}">{escape(text)}</option>' for value, text in options
    )
    return (
        f'<label>{escape(label)}<select data-filter="{name}"><option value="">all</option>'
        f"{items}</select></label>"
    )


def _write_method(summary: Summary) -> str:
    defenses = ", ".join(one["name"] for one in summary["defenses"]) or "none"
    facts = {
        "model": f"{summary['model']['name']} ({summary['model']['class']})",
        "defenses": defenses,
        "requests": f"{summary['twins']}, split {summary['config']['split']}",
        **{name: str(value) for name, value in summary["config"].items()},
        **{f"version of {name}": value for name, value in summary["versions"].items()},
        **{f"seconds to {name}": f"{value:.0f}" for name, value in summary["seconds"].items()},
    }
    pairs = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items()
    )
    return (
        f'<div class="card"><p>{escape(summary["judge"]["what"])}</p>'
        f"<details><summary>Settings and versions</summary><dl>{pairs}</dl></details></div>"
        f'<h2>What this does not show</h2><div class="card">{write_list(_LIMITS)}</div>'
        f'<h2>Do it again</h2><pre tabindex="0">{escape(summary["command"])}</pre>'
        '<p class="soft">numbers.json and numbers.parquet hold every number, answers.json every '
        "answer, figures/ every figure as PNG and SVG, and logs/ the runs for the viewer: inspect "
        "view --log-dir logs.</p>"
    )


def _rate_cell(rate: Record | None) -> str:
    if rate is None:
        return _NOTHING
    low, value, high = (f"{100 * x:.0f}" for x in (rate.low, rate.value, rate.high))
    return f"{value}\u00a0%<small>{low} to {high}</small>"


def _gap_cell(gap: Record | None) -> str:
    if gap is None:
        return _NOTHING
    low, value, high = (f"{100 * x:+.0f}" for x in (gap.low, gap.value, gap.high))
    return f"{value}<small>{low} to {high}</small>"


def curve_data(figure: CurveFigure) -> dict[str, Any]:
    """Return what the page's script needs to know of a figure.

    Args:
        figure: The curves.
    """
    layers = figure.curves[0].layers or tuple(range(len(figure.curves[0].values)))
    return {
        "unit": figure.unit,
        "layers": layers,
        "curves": [
            {
                "name": curve.name,
                "values": curve.values,
                "low": curve.low,
                "high": curve.high,
                "layers": curve.layers or layers,
            }
            for curve in figure.curves
        ],
    }
