"""Every figure of a diagnosis as PNG and SVG, drawn by matplotlib."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from safebridge.diagnosis.config import CONDITIONS
from safebridge.diagnosis.results import (
    CurveFigure,
    PointFigure,
    Record,
    SiteFigure,
    find_record,
)
from safebridge.optional import require

__all__ = ["COLOURS", "plot_curves", "plot_points", "plot_refusals", "plot_sites", "save_figure"]

COLOURS: Final = ("#5a52c4", "#c2571a", "#0c7a6b", "#a0337c", "#7a6a12", "#3b77b5")
"""Colours of curves and bars, in the order in which they come; the report takes the same."""

_INK: Final = "#1d2126"
_LABEL_WIDTH: Final = 44  # characters that fit beside the axis


def plot_curves(figure: CurveFigure) -> Any:
    """Draw curves over the layers with their bands.

    Args:
        figure: What to draw.

    Returns:
        A matplotlib Figure.
    """
    drawn, axes = _new_figure()
    if figure.band is not None:
        axes.axvspan(figure.band[0] - 0.5, figure.band[1] + 0.5, color="#00000010", lw=0)
    for number, curve in enumerate(figure.curves):
        colour = COLOURS[number % len(COLOURS)]
        layers = curve.layers or tuple(range(len(curve.values)))
        axes.fill_between(layers, curve.low, curve.high, color=colour, alpha=0.14, lw=0)
        axes.plot(layers, curve.values, color=colour, lw=1.8, label=curve.name)
    axes.axhline(0, color="#00000040", lw=0.8)
    axes.set_xlabel("decoder layer")
    label = figure.axis + (f" ({figure.unit})" if figure.unit else "")
    axes.set_ylabel(textwrap.fill(label, _LABEL_WIDTH))
    axes.set_title(figure.title, loc="left", fontsize=11, color=_INK)
    axes.legend(frameon=False, fontsize=8)
    return drawn


def plot_refusals(records: Sequence[Record], variants: Sequence[str]) -> Any:
    """Draw how often harmful requests are refused, by condition and variant.

    Args:
        records: The numbers.
        variants: "base" and the names of the defenses.

    Returns:
        A matplotlib Figure.
    """
    drawn, axes = _new_figure()
    height = 0.8 / len(variants)
    for number, variant in enumerate(variants):
        for row, condition in enumerate(CONDITIONS):
            rate = find_record(records, variant, condition, "refusal_rate")
            if rate is None:
                continue
            place = row + height * (number - (len(variants) - 1) / 2)
            ends = [[100 * (rate.value - rate.low)], [100 * (rate.high - rate.value)]]
            axes.barh(
                place,
                100 * rate.value,
                height=0.9 * height,
                color=COLOURS[number % len(COLOURS)],
                xerr=ends,
                ecolor="#00000090",
                label=variant if row == 0 else None,
            )
    axes.set_yticks(range(len(CONDITIONS)), CONDITIONS)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("harmful requests refused (%), with 95 % intervals")
    axes.set_title("Refusal by the way of putting a request", loc="left", fontsize=11, color=_INK)
    if len(variants) > 1:
        axes.legend(frameon=False, fontsize=8)
    return drawn


def plot_sites(figure: SiteFigure) -> Any:
    """Draw maps over layers and heads.

    Args:
        figure: What to draw.

    Returns:
        A matplotlib Figure.
    """
    drawn, grid = _new_figure(columns=len(figure.maps))
    image = None
    for axes, (name, rows) in zip(grid, figure.maps.items(), strict=True):
        image = axes.imshow(
            rows, vmin=0.5, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest"
        )
        every = max(1, len(figure.layers) // 8)
        axes.set_yticks(range(0, len(figure.layers), every), figure.layers[::every])
        axes.set_title(name, fontsize=9, color=_INK)
        axes.set_xlabel("head")
    grid[0].set_ylabel("decoder layer")
    drawn.colorbar(image, ax=list(grid), label="balanced accuracy", shrink=0.8)
    drawn.suptitle(figure.title, fontsize=11, color=_INK)
    return drawn


def plot_points(figure: PointFigure) -> Any:
    """Draw states laid flat.

    Args:
        figure: What to draw.

    Returns:
        A matplotlib Figure.
    """
    drawn, axes = _new_figure()
    for name, (colour, marker) in _point_styles(figure.groups).items():
        x, y = zip(*figure.groups[name], strict=True)
        axes.scatter(x, y, s=22, color=colour, marker=marker, alpha=0.8, label=name, linewidths=0)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(figure.title, loc="left", fontsize=11, color=_INK)
    axes.legend(frameon=False, fontsize=8)
    return drawn


def save_figure(drawn: Any, folder: Path, name: str) -> None:
    """Write a figure as PNG and as SVG; the same numbers give the same files.

    Args:
        drawn: A matplotlib Figure.
        folder: Where to.
        name: File name without an ending.
    """
    matplotlib = require("matplotlib", extra="reports")
    with matplotlib.rc_context({"svg.hashsalt": "safebridge", "svg.fonttype": "none"}):
        drawn.savefig(folder / f"{name}.svg", metadata={"Date": None})
    drawn.savefig(folder / f"{name}.png", dpi=130)


def _point_styles(groups: Mapping[str, object]) -> dict[str, tuple[str, str]]:
    """Colour says harmful or not, the mark says text or picture."""
    return {
        name: (COLOURS[1] if name.startswith("harmful") else COLOURS[2],
               "o" if name.endswith("text") else "^")
        for name in groups
    }  # fmt: skip


def _new_figure(columns: int = 1) -> Any:
    """Return a figure and its axes; no window, no global state."""
    figures = require("matplotlib.figure", extra="reports")
    drawn = figures.Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = drawn.subplots(1, columns, sharey=columns > 1)
    for one in [axes] if columns == 1 else axes:
        one.spines[["top", "right"]].set_visible(False)
    return drawn, axes
