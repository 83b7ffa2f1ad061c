"""Charts of the report as HTML and inline SVG; the page's script makes them answer to a pointer."""

from collections.abc import Sequence
from html import escape
from itertools import pairwise

from safebridge.diagnosis.results import CurveFigure, PointFigure, Record, SiteFigure
from safebridge.reporting.charts import NOTHING, draw_curves, to_percent

__all__ = ["draw_bar_rows", "draw_curve_figure", "draw_point_figure", "draw_site_figure"]

_CLASSES = ("c0", "c1", "c2", "c3", "c4", "c5")
_POINT_CLASSES = {
    "harmless text": "c2 text",
    "harmful text": "c1 text",
    "harmless picture": "c2 picture",
    "harmful picture": "c1 picture",
}
# Dark to bright in even steps of lightness, so that it reads in grey as well.
_RAMP = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


def draw_bar_rows(
    rows: Sequence[tuple[str, str, Sequence[Record | None]]], variants: Sequence[str]
) -> str:
    """Draw one bar for each variant in each row, with interval whiskers.

    Args:
        rows: Label, category ("" where a filter leaves the row alone), and one rate for each
            variant; None where it was not measured.
        variants: Names of the variants.

    Returns:
        An HTML figure.
    """
    lines = ['<figure class="bars">']
    for label, category, rates in rows:
        known = [rate for rate in rates if rate is not None]
        count = f"<small>n = {known[0].n}</small>" if known else ""
        bars = "".join(
            _draw_bar(name, _CLASSES[number % len(_CLASSES)], rate)
            for number, (name, rate) in enumerate(zip(variants, rates, strict=True))
            if rate is not None
        )
        mark = f' data-category="{escape(category)}"' if category else ""
        lines.append(
            f'<div class="bar-row"{mark}><div class="bar-label">{escape(label)}{count}</div>'
            f"<div>{bars or NOTHING}</div></div>"
        )
    return "\n".join([*lines, "</figure>"])


def draw_curve_figure(figure: CurveFigure) -> str:
    """Draw curves over the layers, with a place for the numbers of one layer.

    Args:
        figure: The curves.
    """
    classes = [_CLASSES[number % len(_CLASSES)] for number in range(len(figure.curves))]
    drawn = draw_curves(figure.curves, classes, figure.axis, unit=figure.unit, marked=figure.band)
    return (
        f'<section class="card chart" data-key="{escape(figure.key)}" tabindex="0" role="group" '
        f'aria-label="{escape(figure.title)}. Arrow keys move from layer to layer.">'
        f"<h3>{escape(figure.title)}</h3>{drawn}"
        f'<output class="readout" aria-live="polite">Point at a layer, or use the arrow keys.'
        f'</output><p class="soft">{escape(figure.note)}</p></section>'
    )


def draw_site_figure(figure: SiteFigure) -> str:
    """Draw one map for each pair of media, layers downward and heads to the right.

    Args:
        figure: The maps.
    """
    maps = []
    for name, rows in figure.maps.items():
        heads = len(rows[0])
        cells = "".join(
            f'<rect x="{head}" y="{place}" width="1.02" height="1.02" fill="{_shade(value)}"/>'
            for place, row in enumerate(rows)
            for head, value in enumerate(row)
        )
        spoken = f"{name}. Arrow keys move from head to head."
        maps.append(
            f'<div class="map" data-key="{escape(figure.key)}" data-map="{escape(name)}" '
            f'tabindex="0" role="group" aria-label="{escape(spoken)}"><h4>{escape(name)}</h4>'
            f'<div class="field"><svg viewBox="0 0 {heads} {len(rows)}" '
            f'preserveAspectRatio="none" role="img" aria-label="{escape(name)}">{cells}</svg></div>'
            '<output class="readout" aria-live="polite">&nbsp;</output></div>'
        )
    ramp = "".join(f'<i style="background:{_shade(0.5 + step / 20)}"></i>' for step in range(11))
    return (
        f'<section class="card"><h3>{escape(figure.title)}</h3><div class="maps">{"".join(maps)}'
        f'</div><p class="ramp">0.5 {ramp} 1.0</p><p class="soft">{escape(figure.note)} Layers go '
        "down, heads to the right.</p></section>"
    )


def draw_point_figure(figure: PointFigure) -> str:
    """Draw states laid flat; colour says harmful or not, form says text or picture.

    Args:
        figure: The points.
    """
    points = [point for group in figure.groups.values() for point in group]
    (left, right), (bottom, top) = ((min(axis), max(axis)) for axis in zip(*points, strict=True))
    wide, high = (right - left) or 1.0, (top - bottom) or 1.0
    marks = []
    for name, group in figure.groups.items():
        kind = _POINT_CLASSES.get(name, "c0 text")
        for x, y in group:
            across, down = 4 + 92 * (x - left) / wide, 4 + 92 * (top - y) / high
            marks.append(_mark(kind, across, down))
    keys = "".join(
        f'<span class="key"><svg viewBox="0 0 4 4" aria-hidden="true">'
        f"{_mark(_POINT_CLASSES.get(name, 'c0 text'), 2.0, 2.0)}</svg>{escape(name)}</span>"
        for name in figure.groups
    )
    return (
        f'<section class="card"><h3>{escape(figure.title)}</h3><svg class="points" '
        f'viewBox="0 0 100 100" role="img" aria-label="{escape(figure.note)}">{"".join(marks)}'
        f'</svg><div class="keys">{keys}</div><p class="soft">{escape(figure.note)}</p></section>'
    )


def _draw_bar(name: str, kind: str, rate: Record) -> str:
    value, low, high = (100 * number for number in (rate.value, rate.low, rate.high))
    spoken = f"{name}: {to_percent(rate.value)}"
    return (
        f'<div class="bar"><svg viewBox="0 0 100 10" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(spoken)}"><rect class="track" width="100" height="10"/>'
        f'<rect class="{kind}" width="{value:.2f}" height="10"/>'
        f'<path class="whisker" d="M{low:.2f} 5H{high:.2f}M{low:.2f} 2.5V7.5M{high:.2f} 2.5V7.5"/>'
        f"</svg><span>{to_percent(rate.value)}</span></div>"
    )


def _mark(kind: str, x: float, y: float) -> str:
    if kind.endswith("text"):
        return f'<circle class="{kind}" cx="{x:.2f}" cy="{y:.2f}" r="1.3"/>'
    return f'<path class="{kind}" d="M{x:.2f} {y - 1.6:.2f}l1.6 2.9h-3.2z"/>'


def _shade(value: float) -> str:
    """Return the colour of a number between 0.5 and 1; what is below is as dark as 0.5."""
    place = min(1.0, max(0.0, 2 * value - 1)) * (len(_RAMP) - 1)
    low, high = list(pairwise(_RAMP))[min(int(place), len(_RAMP) - 2)]
    part = place - min(int(place), len(_RAMP) - 2)
    mixed = (round(a + part * (b - a)) for a, b in zip(low, high, strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)
