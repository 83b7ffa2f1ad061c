"""What a diagnosis finds, as plain values that the report and the files are made from."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, final

from safebridge.analysis.curves import LayerCurve

__all__ = [
    "CurveFigure",
    "Finding",
    "PointFigure",
    "Record",
    "Reply",
    "SiteFigure",
    "find_record",
    "list_curve_records",
]


@final
@dataclass(frozen=True)
class Reply:
    """One answer and what the judge made of it."""

    answer: str
    """What the model said."""

    label: str
    """refusal, objection, answer or empty."""

    rule: str
    """The judge's rule that decided."""

    @property
    def is_refusal(self) -> bool:
        """Whether the answer refuses."""
        return self.label == "refusal"

    @property
    def is_compliance(self) -> bool:
        """Whether the answer goes along: neither refusal nor objection, and not empty."""
        return self.label == "answer"


@final
@dataclass(frozen=True)
class Record:
    """One number of the diagnosis."""

    variant: str
    """"base", or the name of a defense."""

    setting: str
    """Condition, or what a curve or map is about."""

    metric: str
    """What was measured, e.g. "refusal_rate"."""

    split: str
    """The part of the data it was measured on."""

    value: float
    """The number."""

    low: float
    """Lower end of the 95 % interval; the number itself where there is none."""

    high: float
    """Upper end of the 95 % interval; the number itself where there is none."""

    n: int
    """How many samples it rests on."""

    seeds: tuple[int, ...]
    """The seeds of the run."""

    category: str = ""
    """The category it is limited to, or "" for all."""

    layer: int | None = None
    """The decoder layer, from 0."""

    head: int | None = None
    """The head of that layer, from 0."""

    p_value: float | None = None
    """Exact McNemar test of a paired difference."""

    p_adjusted: float | None = None
    """The same after Holm's method, over the conditions of this variant."""

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON values; what does not apply is left out."""
        kept = {name: value for name, value in asdict(self).items() if value not in (None, "")}
        return kept | {"seeds": list(self.seeds)}


def find_record(
    records: Iterable[Record], variant: str, setting: str, metric: str, *, category: str = ""
) -> Record | None:
    """Return one number, or None if it was not measured.

    Args:
        records: Where to look.
        variant: Its variant.
        setting: Its setting.
        metric: Its metric.
        category: Its category.
    """
    wanted = (variant, setting, metric, category)
    for record in records:
        if (record.variant, record.setting, record.metric, record.category) == wanted:
            return record
    return None


@final
@dataclass(frozen=True)
class CurveFigure:
    """Curves over the layers that belong into one figure."""

    key: str
    """File name of the figure and metric of its records."""

    title: str
    """What it shows."""

    axis: str
    """The vertical axis in words."""

    unit: str
    """What stands behind a number of that axis, e.g. "°"."""

    note: str
    """How to read it."""

    curves: tuple[LayerCurve, ...]
    """The curves."""

    variants: tuple[str, ...]
    """The variant of each curve."""

    band: tuple[int, int] | None = None
    """First and last layer of a band to mark."""


@final
@dataclass(frozen=True)
class SiteFigure:
    """One number for each head of each layer."""

    key: str
    """File name of the figure and metric of its records."""

    title: str
    """What it shows."""

    note: str
    """How to read it."""

    layers: tuple[int, ...]
    """Decoder layers, from 0."""

    maps: Mapping[str, Sequence[Sequence[float]]]
    """Name to [layers][heads]."""

    n: int
    """Prompts tested."""


@final
@dataclass(frozen=True)
class PointFigure:
    """States laid flat."""

    key: str
    """File name of the figure."""

    title: str
    """What it shows."""

    note: str
    """How to read it."""

    groups: Mapping[str, Sequence[Sequence[float]]]
    """Name of a group to its points."""


@final
@dataclass(frozen=True)
class Finding:
    """One sentence of the verdict, with the numbers it rests on."""

    question: str
    """whether, where, why or fix."""

    text: str
    """What was found."""

    rests_on: tuple[str, ...] = field(default=())
    """The numbers, ready to read."""


def list_curve_records(
    figures: Sequence[CurveFigure], *, split: str, seeds: Sequence[int]
) -> list[Record]:
    """Return every point of every curve as a record.

    Args:
        figures: The figures.
        split: The part of the data.
        seeds: The seeds of the run.
    """
    return [
        Record(
            variant=variant,
            setting=curve.name,
            metric=figure.key,
            split=split,
            value=curve.values[place],
            low=curve.low[place],
            high=curve.high[place],
            n=curve.n,
            seeds=tuple(seeds),
            layer=layer,
        )
        for figure in figures
        for curve, variant in zip(figure.curves, figure.variants, strict=True)
        for place, layer in enumerate(curve.layers or range(len(curve.values)))
    ]
