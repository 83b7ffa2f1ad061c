"""The page that `text_guided_alignment_results.py` writes."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Final

from text_guided_alignment_variants import PAPERS, VARIANTS

__all__ = [
    "ALL",
    "AS_IT_IS",
    "AT_INFERENCE",
    "AVERAGED",
    "COMPARED",
    "FULL",
    "SEEN",
    "STEM",
    "UNSEEN",
    "Row",
    "render",
]

STEM: Final = "text-guided-alignment"
"""Name of the page and of its JSON twin."""
FULL, ALL = "full", "all"
SEEN, UNSEEN = "seen", "unseen"
AS_IT_IS: Final = "as it is"
"""Nothing replaced and nothing left out."""
AVERAGED: Final = "mean over the layers"
AT_INFERENCE: Final = "retrieval at inference"
GOAL_VARIANTS: Final = (PAPERS, "centred")
SPARED: Final = 0.75
"""Share of the naming that a window leaves if it is to tell anything about refusing."""
SAME_SETTINGS: Final = (
    "centred-layers-repository",
    "centred-layers-first-third",
    "centred-layers-last-third",
    "centred-teacher-current",
    "centred-projector",
)
"""Ablations of the centred loss in which one setting of the method is another."""
ALIGNED: Final = 0.6
"""Share of pictures that an aligned model names at least, as the embedded model's card asks."""

COMPARED: Final = {
    "picture, seen": ("image_refusal_rate", SEEN),
    "picture, held out": ("image_refusal_rate", UNSEEN),
    "over-refusal": ("over_refusal_rate", ALL),
    "naming": ("naming_accuracy", ALL),
    "text": ("text_refusal_rate", ALL),
}
"""What variants are compared in, by the column's title."""

CRITERIA: Final = {
    "paper_start": "paper: the first in which a refusal's word grows by the largest factor",
    "repository_start": "repository: the first in which one is among those that grow by most",
    "end": "the last from there on in which one is the likeliest word",
}
"""What is said of the layers that `measure_activation_layers` finds."""

Row = dict[str, Any]
"""One record of the JSON twin."""


def find(
    records: Sequence[Row], variant: str, metric: str, split: str = ALL, setting: str = FULL
) -> Row | None:
    """Return one record, if it was measured."""
    wanted = (variant, metric, split, setting)
    keys = ("variant", "metric", "split", "setting")
    return next((r for r in records if tuple(r[key] for key in keys) == wanted), None)


def cell(record: Row | None) -> str:
    """Print a rate with its interval."""
    if record is None:
        return ""
    return f"{record['value']:.1%} [{record['low']:.1%}, {record['high']:.1%}]"


def check_goals(records: Sequence[Row]) -> list[Row]:
    """Compare the paper's method, and ours of centred states, with their goals."""
    goals = []
    for variant in GOAL_VARIANTS:
        get = partial(find, records)
        text = get(variant, "text_refusal_rate", UNSEEN)
        image = get(variant, "image_refusal_rate", UNSEEN)
        over, plain_over = (get(v, "over_refusal_rate") for v in (variant, "plain"))
        named, plain_named = (get(v, "naming_accuracy") for v in (variant, "plain"))
        if not (text and image and over and plain_over and named and plain_named):
            continue
        share = image["value"] / max(text["value"], 1e-9)
        more = over["value"] - plain_over["value"]
        less = named["value"] - plain_named["value"]
        found = (
            ("refusal transferred to held-out categories", share, "at least 50 %", share >= 0.5),  # noqa: PLR2004 - the goal
            ("more over-refusal than plain", more, "at most 2 points", more <= 0.02),  # noqa: PLR2004 - the goal
            ("naming accuracy against plain", less, "not lower", less >= 0),
        )
        names = ("goal", "value", "wanted", "is_met")
        goals += [{"variant": variant, **dict(zip(names, each, strict=True))} for each in found]
    return goals


def render(records: Sequence[Row], about: str, command: str) -> str:
    """Return the page.

    Args:
        records: What was measured.
        about: What it was measured on, the page's first paragraph.
        command: The command that made it.
    """
    lines = [
        "# Results: text-guided alignment",
        "",
        about,
        "",
        f"Command: `{command}`. The numbers are also in `{STEM}.json`.",
        *render_short(records),
        "",
        "## Goals",
        "",
        "| variant | goal | wanted | measured | met |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {goal['variant']} | {goal['goal']} | {goal['wanted']} | {goal['value']:.1%} "
        f"| {'yes' if goal['is_met'] else '**no**'} |"
        for goal in check_goals(records)
    ]
    columns = {
        "text": ("text_refusal_rate", ALL, FULL),
        "picture": ("image_refusal_rate", ALL, FULL),
        "picture, held out": ("image_refusal_rate", UNSEEN, FULL),
        "picture, with retrieval": ("image_refusal_rate", ALL, AT_INFERENCE),
        "over-refusal": ("over_refusal_rate", ALL, FULL),
        "over-refusal, with retrieval": ("over_refusal_rate", ALL, AT_INFERENCE),
        "naming": ("naming_accuracy", ALL, FULL),
    }
    lines += ["", "## Variants", "", f"| variant | what | {' | '.join(columns)} | gap | seeds |"]
    lines += ["|---" * (len(columns) + 4) + "|"]
    for variant in VARIANTS:
        cells = [find(records, variant.name, *column) for column in columns.values()]
        if not any(cells):
            continue
        text, image = cells[0], cells[1]
        gap = f"{text['value'] - image['value']:.1%}" if text and image else ""
        seeds = next(record["seeds"] for record in cells if record)
        lines.append(
            f"| {variant.name} | {variant.setting} | {' | '.join(map(cell, cells))} "
            f"| {gap} | {', '.join(map(str, seeds))} |"
        )
    for part in PARTS:
        lines += part(records)
    return "\n".join(lines) + "\n"


def render_short(records: Sequence[Row]) -> list[str]:
    """Return the findings in a few sentences, as far as they were measured."""
    held_out, over = COMPARED["picture, held out"], COMPARED["over-refusal"]
    lines = []
    for name, what in (
        (PAPERS, "The paper's loss"),
        ("centred", "The same loss on centred states"),
    ):
        found = [find(records, name, *column, "less plain") for column in (held_out, over)]
        if all(found):
            lines.append(
                f"- {what} (`{name}`) changes the refusal of held-out pictures by "
                f"{points(found[0])} points against plain alignment, over-refusal by "
                f"{points(found[1])}."
            )
    found = [find(records, name, *held_out, "less centred") for name in SAME_SETTINGS]
    measured = dict(zip(SAME_SETTINGS, found, strict=True))
    parts = [f"`{name}` {points(record)}" for name, record in measured.items() if record]
    if parts:
        lines.append(
            "- Against `centred`, other layers, another teacher, or a guide loss that moves the "
            f"projector alone change the refusal of held-out pictures by {', '.join(parts)}."
        )
    related = find(records, "plain", "gap_by_refusal", setting=AVERAGED)
    if related:
        value, low, high = (f"{related[key]:.2f}" for key in ("value", "low", "high"))
        lines.append(
            "- Pictures nearer to their caption are refused more often: correlation of centred "
            f"cosine and refusal {value} [{low}, {high}], as the paper's explanation has it. What "
            "raises the raw cosine alone does not help (*What the loss moves*)."
        )
    over_refused = {
        words: [find(records, name, metric) for name in ("start", "plain", "centred")]
        for metric, words in (
            ("spelled_over_refusal_rate", "with the name of the thing in the picture's place"),
            ("text_over_refusal_rate", "wholly in text"),
        )
    }
    if all(all(found) for found in over_refused.values()):
        parts = [f"{words} {' / '.join(map(cell, found))}" for words, found in over_refused.items()]
        lines.append(
            "- Where over-refusal comes from: harmless requests are refused before alignment / "
            f"after plain / after `centred`, {'; '.join(parts)}. What is refused with the name "
            "written needs no reading of a picture: it is the over-refusal of text safety, which "
            "comes over with the rest. What rises in text besides is new."
        )
    return ["", "## In short", "", *lines] if lines else []


def render_caution(records: Sequence[Row]) -> list[str]:
    """Say so if the plain model cannot see well enough for its refusals to mean anything."""
    named, over = (find(records, "plain", m) for m in ("naming_accuracy", "over_refusal_rate"))
    if named is None or over is None or named["value"] >= ALIGNED:
        return []
    caution = (
        f"Caution: plain alignment names {cell(named)} of the pictures and refuses {cell(over)} of "
        "the harmless requests. It is not trained to the end, and much of what it refuses, it "
        "refuses without having recognised it. More steps come before any comparison."
    )
    return ["", caution]


def render_changes(records: Sequence[Row]) -> list[str]:
    """Return the table of paired differences."""
    about = (
        "Differences in points, paired by request and seed, with 95 % intervals clustered by "
        "concept. Where an interval holds 0, the two cannot be told apart."
    )
    columns = ("variant", "against", *COMPARED, "seeds")
    lines = ["", "## One thing changed", "", about, "", f"| {' | '.join(columns)} |"]
    lines += ["|---" * len(columns) + "|"]
    for variant in VARIANTS:
        setting = f"less {variant.against}"
        found = [find(records, variant.name, *column, setting) for column in COMPARED.values()]
        if not any(found):
            continue
        seeds = next(each["seeds"] for each in found if each)
        lines.append(
            f"| {variant.name} | {variant.against} | {' | '.join(map(points, found))} "
            f"| {', '.join(map(str, seeds))} |"
        )
    return lines


def render_moves(records: Sequence[Row]) -> list[str]:
    """Return what each variant does to the cosines, beside what it does to refusals."""
    about = (
        "Cosines of picture and caption, as means over the layers. What the states of a layer "
        "share decides much of the raw one, so it can rise without any picture becoming more like "
        "its own caption; the centred one, where each modality's mean is taken away, says whether "
        "it does (lowest and highest seed in brackets)."
    )
    columns = ("variant", "raw cosine", "centred cosine", "picture refused, held out")
    lines = ["", "## What the loss moves", "", about, "", f"| {' | '.join(columns)} |"]
    lines += ["|---" * len(columns) + "|"]
    for variant in VARIANTS:
        raw, centred = (mean_cosine(records, variant.name, kind) for kind in ("raw", "centred"))
        if raw and centred:
            refused = cell(find(records, variant.name, "image_refusal_rate", UNSEEN))
            lines.append(f"| {variant.name} | {raw} | {centred} | {refused} |")
    return lines


def mean_cosine(records: Sequence[Row], variant: str, kind: str) -> str:
    """Print one cosine's mean over the layers, with the means of the seeds' extremes."""
    found = [
        record
        for record in records
        if record["variant"] == variant
        and record["metric"] == "hidden_state_cosine"
        and record["setting"].endswith(f", {kind}")
    ]
    if not found:
        return ""
    value, low, high = (
        sum(record[name] for record in found) / len(found) for name in ("value", "low", "high")
    )
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def points(record: Row | None) -> str:
    """Print a difference with its interval, in points."""
    if record is None:
        return ""
    value, low, high = (f"{100 * record[name]:+.1f}" for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def render_details(records: Sequence[Row]) -> list[str]:
    """Return the tables by category and by layer."""
    measured = {record["variant"] for record in records}
    main = [v.name for v in VARIANTS if v.is_main and v.name in measured] or sorted(measured)
    lines = ["", "## Pictures refused, by category", "", f"| category | {' | '.join(main)} |"]
    lines += ["|---" * (len(main) + 1) + "|"]
    categories = sorted({
        record["split"]
        for record in records
        if record["metric"] == "text_refusal_rate" and record["split"] not in {ALL, SEEN, UNSEEN}
    })  # fmt: skip
    for category in categories:
        cells = [cell(find(records, name, "image_refusal_rate", category)) for name in main]
        lines.append(f"| {category} | {' | '.join(cells)} |")
    lines += ["", "## Centred cosine of picture and caption, by layer", ""]
    lines += [f"| layer | {' | '.join(main)} |", "|---" * (len(main) + 1) + "|"]
    layers = [
        int(record["setting"].split(",")[0].removeprefix("layer "))
        for record in records
        if record["metric"] == "hidden_state_cosine"
        and record["variant"] == main[0]
        and record["setting"].endswith("centred")
    ]
    for layer in sorted(set(layers)):
        found = [
            find(records, name, "hidden_state_cosine", setting=f"layer {layer}, centred")
            for name in main
        ]
        values = [f"{record['value']:.3f}" if record else "" for record in found]
        lines.append(f"| {layer} | {' | '.join(values)} |")
    return lines


def render_where(records: Sequence[Row]) -> list[str]:
    """Return in which layers a refusal begins in text."""
    found = {
        words: [
            find(records, "plain", "activation_layer", setting=f"{name}, {part}")
            for part in ("median", "activated", "never")
        ]
        for name, words in CRITERIA.items()
    }
    counts = [each["n"] for row in found.values() for each in row if each]
    if not counts:
        return []
    about = (
        f"The plain model, {counts[0]} harmful requests in text; layers count from 0, and "
        "medians are of the requests that have such a layer."
    )
    columns = ("layer", "median", "requests that have one", "that have none")
    lines = ["", "## Where a refusal begins in text", "", about, "", f"| {' | '.join(columns)} |"]
    lines += ["|---" * len(columns) + "|"]
    for words, numbers in found.items():
        values = [f"{each['value']:g}" if each else "" for each in numbers]
        lines.append(f"| {words} | {' | '.join(values)} |")
    return lines


def render_bypass(records: Sequence[Row]) -> list[str]:
    """Return what leaving out layers does to refusals in text, and to everything else."""
    metrics = ("bypass_text_refusal_rate", "bypass_naming_accuracy")
    rows = {
        record["setting"]: [
            find(records, "plain", metric, setting=record["setting"]) for metric in metrics
        ]
        for record in records
        if record["metric"] == metrics[0]
    }
    if not rows:
        return []
    about = (
        "Each of these windows of layers passes on what it was given (plain model, the same "
        "requests; named: as many pictures). Layers that refusing needs more than everything else "
        f"does are where refusals fall and naming stays. {_most_selective(rows)}"
    )
    lines = ["", "### Without some layers", "", about.rstrip(), ""]
    lines += ["| layers | refused | named |", "|---|---|---|"]
    lines += [
        f"| {setting} | {' | '.join(map(cell, values))} |" for setting, values in rows.items()
    ]
    return lines


def _most_selective(rows: dict[str, list[Row | None]]) -> str:
    """Name the window that costs most refusals among those that leave most of the naming."""
    values = {
        setting: (refused["value"], named["value"])
        for setting, (refused, named) in rows.items()
        if refused and named
    }
    whole = values.pop(AS_IT_IS)
    spared = {setting: value for setting, value in values.items() if value[1] >= SPARED * whole[1]}
    if not spared:
        return ""
    setting = min(spared, key=lambda name: spared[name][0])
    refused, named = spared[setting]
    return (
        f"Of the windows that leave {SPARED:.0%} of the naming, refusals fall furthest {setting}: "
        f"to {refused:.0%} of {whole[0]:.0%}, with {named:.0%} of {whole[1]:.0%} named."
    )


def render_gap(records: Sequence[Row]) -> list[str]:
    """Return whether pictures nearer to their caption are refused more often."""
    found = [record for record in records if record["metric"] == "gap_by_refusal"]
    if not found:
        return []
    about = (
        f"The plain model, {found[0]['n']} harmful pictures: mean centred cosine of picture and "
        "caption of those that it refuses and of those that it answers, and the correlation of "
        "cosine and refusal over all of them, with intervals of 95 % clustered by concept."
    )
    title = "## Are pictures nearer to their caption refused more often?"
    lines = ["", title, "", about, "", "| states | refused | answered | correlation |"]
    lines += ["|---|---|---|---|"]
    for record in found:
        sides = " | ".join(f"{record.get(name, 0.0):.3f}" for name in ("refused", "answered"))
        value, low, high = (f"{record[name]:.2f}" for name in ("value", "low", "high"))
        lines.append(f"| {record['setting']} | {sides} | {value} [{low}, {high}] |")
    return lines


def render_bounds(records: Sequence[Row]) -> list[str]:
    """Return what reading pictures without error would bring, and caption states in their place."""
    about = (
        "With the caption written into the request in the picture's place; and with the picture's "
        "tokens spelled as the name of what it shows, as a perfect projector would write them. "
        "What the language model refuses of harmless things then, no reading of pictures takes "
        "away: it is the over-refusal of its text safety, which is carried over with the rest. "
        "Spelled: the first seed."
    )
    columns = {
        "harmful, in text": ("caption_refusal_rate", FULL),
        "harmful, spelled": ("spelled_refusal_rate", FULL),
        "harmless, spelled": ("spelled_over_refusal_rate", FULL),
    }
    lines = ["", "## What could be reached at most", "", about, ""]
    lines += [f"| variant | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for variant in VARIANTS:
        cells = [
            find(records, variant.name, metric, setting=setting)
            for metric, setting in columns.values()
        ]
        if cells[1]:
            lines.append(f"| {variant.name} | {' | '.join(map(cell, cells))} |")
    lines += [
        "",
        "The plain model, with its image tokens holding their caption's mean state after ",
    ]
    lines[-1] += "one layer:"
    lines += ["", "| changed | refused |", "|---|---|"]
    lines += [
        f"| {record['setting']} | {cell(record)} |"
        for record in records
        if record["metric"] == "replacement_refusal_rate"
    ]
    return lines


PARTS: Final = (
    render_caution,
    render_changes,
    render_moves,
    render_details,
    render_where,
    render_bypass,
    render_gap,
    render_bounds,
)
"""The page's parts below the table of variants."""
