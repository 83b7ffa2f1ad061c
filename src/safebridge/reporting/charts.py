"""Charts as HTML and inline SVG: no scripts, no fonts, readable on a phone."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from safebridge.analysis.curves import LayerCurve

__all__ = ["NOTHING", "draw_bars", "draw_curves", "to_percent"]

NOTHING = "\u2013"
"""What stands where there is no number."""


def to_percent(value: float | None) -> str:
    """Return a rate in [0, 1] as a percentage, e.g. "93.3 %"; None is a dash."""
    return NOTHING if value is None else f"{100 * value:.1f}\u00a0%"


def draw_bars(
    title: str, rows: Sequence[tuple[str, str, Mapping[str, Any], Mapping[str, Any]]]
) -> str:
    """Draw two bars a row, base above defended, with interval whiskers.

    Args:
        title: What the bars measure.
        rows: Label, badge (may be ""), and the two rates with `value low high n`.

    Returns:
        An HTML figure.
    """
    lines = [f'<figure class="bars"><figcaption>{escape(title)}</figcaption>']
    for label, badge, base, defended in rows:
        mark = f' <span class="badge">{escape(badge)}</span>' if badge else ""
        lines.append(
            f'<div class="bar-row"><div class="bar-label">{escape(label)}{mark}'
            f"<small>n = {escape(str(base['n']))}</small></div><div>"
            f"{_draw_bar('base', base)}{_draw_bar('defended', defended)}</div></div>"
        )
    lines.append("</figure>")
    return "\n".join(lines)


def _draw_bar(side: str, rate: Mapping[str, Any]) -> str:
    value, low, high = (100 * (rate[key] or 0.0) for key in ("value", "low", "high"))
    spoken = f"{side}: {to_percent(rate['value'])}"
    return (
        f'<div class="bar"><svg viewBox="0 0 100 10" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(spoken)}"><rect class="track" width="100" height="10"/>'
        f'<rect class="{side}" width="{value:.2f}" height="10"/>'
        f'<path class="whisker" d="M{low:.2f} 5H{high:.2f}M{low:.2f} 2.5V7.5M{high:.2f} 2.5V7.5"/>'
        f"</svg><span>{to_percent(rate['value'])}</span></div>"
    )


def draw_curves(
    curves: Sequence[LayerCurve],
    classes: Sequence[str],
    axis: str,
    *,
    unit: str = "°",
    marked: tuple[int, int] | None = None,
) -> str:
    """Draw one line with its band per curve over the decoder layers.

    Lines live in a stretched SVG and words in HTML above it, so that the words keep their
    size on every screen.

    Args:
        curves: The curves, all of the same length.
        classes: CSS class of each curve, which gives its colour.
        axis: Name and unit of the vertical axis.
        unit: What stands behind a number of that axis.
        marked: First and last of the layers to mark, if any.

    Returns:
        An HTML figure.
    """
    low = min(0.0, *(value for curve in curves for value in curve.low))
    high = max(1e-6, *(value for curve in curves for value in curve.high))
    step = _find_step(high - low)
    bottom, top = step * math.floor(low / step), step * -math.floor(-high / step)
    count = len(curves[0].values)
    layers = curves[0].layers or tuple(range(count))

    def place(layer: int, value: float) -> str:
        across = 100 * layer / max(1, count - 1)
        return f"{across:.2f},{100 * (top - value) / (top - bottom):.2f}"

    drawn = [_draw_mark(layers, marked), _draw_grid(bottom, top, step)]
    for curve, name in zip(curves, classes, strict=True):
        forth = " ".join(place(layer, value) for layer, value in enumerate(curve.high))
        back = " ".join(place(layer, curve.low[layer]) for layer in reversed(range(count)))
        line = " ".join(place(layer, value) for layer, value in enumerate(curve.values))
        drawn.append(f'<polygon class="band {name}" points="{forth} {back}"/>')
        drawn.append(f'<polyline class="line {name}" points="{line}"/>')
    keys = "".join(
        f'<span class="key"><i class="{name}"></i>{escape(curve.name)}</span>'
        for curve, name in zip(curves, classes, strict=True)
    )
    return (
        f'<figure class="curves"><figcaption>{escape(axis)}</figcaption><div class="plot">'
        f"{_label_axes(bottom, top, step, layers, unit)}"
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(axis)}">{"".join(drawn)}</svg></div>'
        f'<div class="axis-name">decoder layer</div><div class="keys">{keys}</div></figure>'
    )


def _draw_mark(layers: Sequence[int], marked: tuple[int, int] | None) -> str:
    if marked is None:
        return ""
    inside = [place for place, layer in enumerate(layers) if marked[0] <= layer <= marked[1]]
    if not inside:
        return ""
    width = 100 / max(1, len(layers) - 1)
    start = max(0.0, width * (inside[0] - 0.5))
    end = min(100.0, width * (inside[-1] + 0.5))
    return f'<rect class="mark" x="{start:.2f}" width="{end - start:.2f}" height="100"/>'


def _draw_grid(bottom: float, top: float, step: float) -> str:
    lines = []
    for tick in _find_ticks(bottom, top, step):
        height = 100 * (top - tick) / (top - bottom)
        kind = "zero" if abs(tick) < step / 2 else "grid"
        lines.append(f'<path class="{kind}" d="M0 {height:.2f}H100"/>')
    return "".join(lines)


def _label_axes(bottom: float, top: float, step: float, layers: Sequence[int], unit: str) -> str:
    words = [
        f'<span class="y" style="top:{100 * (top - tick) / (top - bottom):.2f}%">{tick:g}{unit}'
        "</span>"
        for tick in _find_ticks(bottom, top, step)
    ]
    count = len(layers)
    every = max(1, -(-count // 7))
    words += [
        f'<span class="x" style="left:{100 * place / max(1, count - 1):.2f}%">{layers[place]}'
        "</span>"
        for place in range(0, count, every)
    ]
    return "".join(words)


def _find_ticks(bottom: float, top: float, step: float) -> list[float]:
    return [round(bottom + step * i, 9) for i in range(round((top - bottom) / step) + 1)]


def _find_step(span: float) -> float:
    """Return the largest of 1, 2, 5 times a power of ten that gives at least four steps."""
    power = 10.0 ** math.floor(math.log10(span / 4))
    return max(factor * power for factor in (1, 2, 5) if factor * power <= span / 4)
