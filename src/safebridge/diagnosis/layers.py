"""Where and why: everything that the diagnosis reads from the decoder's layers."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, final

import torch
from jaxtyping import Float
from torch import Tensor

from safebridge.activations.capture import capture_activations
from safebridge.analysis.activation_layers import measure_activation_layers
from safebridge.analysis.curves import LayerCurve
from safebridge.analysis.modality_gap import measure_modality_gap
from safebridge.analysis.modality_shift import measure_modality_shift
from safebridge.analysis.probe_maps import ProbeMap, SiteFeatures, measure_probe_map
from safebridge.analysis.projection import project_states
from safebridge.analysis.safety_layers import (
    SafetyRange,
    find_safety_range,
    measure_activation_shift,
    measure_angular_gap,
    measure_pair_angles,
    measure_shift_difference,
)
from safebridge.analysis.scaling import BoundSweep, choose_alpha, refine_range, scaled_layers
from safebridge.analysis.states import PromptStates, capture_states
from safebridge.data.sample import Sample
from safebridge.diagnosis.config import DiagnosisConfig
from safebridge.diagnosis.plan import Case
from safebridge.diagnosis.results import CurveFigure, PointFigure, Record, SiteFigure
from safebridge.errors import SettingError
from safebridge.evaluation.judges import score_refusal
from safebridge.models.generate import generate_answers
from safebridge.models.load import VLM

__all__ = [
    "Figures",
    "GroupStates",
    "Groups",
    "build_figures",
    "capture_groups",
    "choose_groups",
    "measure_lens",
]

MEDIA: Final = ("text", "picture")
"""The two ways of putting a request whose layers are compared."""

_SPREAD_SHARE: Final = 15 / 721  # where the paper stops, as a share of its requests


@final
@dataclass(frozen=True)
class Groups:
    """The requests whose layers are read."""

    samples: Mapping[tuple[str, bool], tuple[Sample, ...]]
    """Medium and whether they are harmful, to requests."""

    same_wording: bool
    """Whether enough of them share a template to compare within templates."""


@final
@dataclass(frozen=True, eq=False)
class GroupStates:
    """States of the groups, of one variant."""

    states: Mapping[tuple[str, bool], PromptStates]
    """Medium and whether they are harmful, to states."""

    def pair(self, medium: str) -> tuple[PromptStates, PromptStates]:
        """Return the states of harmless and of harmful requests."""
        return self.states[medium, False], self.states[medium, True]


def choose_groups(cases: Sequence[Case], count: int) -> Groups:
    """Take the first requests of each kind.

    Args:
        cases: All requests.
        count: How many harmful and how many harmless ones.
    """
    samples = {
        (medium, side): tuple(case.samples[medium] for case in cases if case.is_harmful == side)[
            :count
        ]
        for medium in MEDIA
        for side in (False, True)
    }
    return Groups(samples, _share_wording(samples["text", False], samples["text", True]))


def capture_groups(
    vlm: VLM, groups: Groups, *, batch_size: int, media: Sequence[str] = MEDIA
) -> GroupStates:
    """Capture the states of all groups, with whatever defense is active.

    Args:
        vlm: The model.
        groups: The requests.
        batch_size: Requests in one pass.
        media: Which media.
    """
    return GroupStates(
        {
            place: capture_states(vlm, samples, batch_size=batch_size)
            for place, samples in groups.samples.items()
            if place[0] in media
        }
    )


@final
@dataclass(frozen=True)
class Figures:
    """Everything about layers that the report shows."""

    curves: tuple[CurveFigure, ...]
    """Figures of curves."""

    sites: tuple[SiteFigure, ...]
    """Maps over layers and heads."""

    points: tuple[PointFigure, ...]
    """States laid flat."""

    ranges: Mapping[str, SafetyRange | None]
    """Safety layers by medium, and by defense on pictures."""

    sweep: BoundSweep | None
    """The scaling test, if it was done."""

    records: tuple[Record, ...]
    """Numbers that are on no curve."""

    notes: tuple[str, ...]
    """What was left out, and why."""


def build_figures(
    vlm: VLM,
    groups: Groups,
    base: GroupStates,
    defended: Mapping[str, GroupStates],
    *,
    lens: Mapping[str, Mapping[str, LayerCurve]],
    config: DiagnosisConfig,
) -> Figures:
    """Measure everything about layers.

    Args:
        vlm: The model as it is.
        groups: The requests.
        base: Their states.
        defended: Their states with each defense.
        lens: What `measure_lens` returned for each variant.
        config: Sizes and seed.
    """
    gaps = _measure_gaps(groups, base, defended, config)
    ranges = {name: find_safety_range(curve) for name, curve in gaps.items()}
    band = ranges["text"]
    marked = None if band is None else (band.first, band.last)
    notes: list[str] = []
    sweep = _run_sweep(vlm, groups, band, config, notes)
    curves = [
        _gap_figure(gaps, marked, groups),
        _pair_figure(groups, base, config),
        *_defense_figures(base, defended, config, marked),
        *_shift_figures(base, defended, config, marked),
        *_lens_figures(lens, marked),
        *_caption_figures(vlm, groups, config, notes),
    ]
    probes, sites = _measure_probes(vlm, groups, base, config)
    curves += probes
    return Figures(
        curves=tuple(curves),
        sites=tuple(sites),
        points=tuple(_draw_points(base, gaps["text"], config)),
        ranges=ranges,
        sweep=sweep,
        records=tuple(_list_range_records(ranges, sweep, config)),
        notes=tuple(notes),
    )


def measure_lens(vlm: VLM, groups: Groups, *, batch_size: int) -> dict[str, LayerCurve]:
    """Measure the probability of a refusal's first word after every layer, by logit lens.

    Args:
        vlm: The model, with whatever defense is active on it.
        groups: The requests; the harmful ones are looked at.
        batch_size: Requests in one pass.

    Returns:
        One curve for each medium, without a band; none for a model that reads pictures by
        cross-attention.
    """
    found: dict[str, LayerCurve] = {}
    # Such a model skips layers without a picture, so text and pictures have no common depth.
    for medium in () if vlm.layout.cross_attention_layers else MEDIA:
        samples = groups.samples[medium, True]
        report = measure_activation_layers(vlm, samples, batch_size=batch_size)
        values = report.refusal_probability
        found[medium] = _bare(medium, values, len(samples))
    return found


def _share_wording(harmless: Sequence[Sample], harmful: Sequence[Sample]) -> bool:
    """Say whether at least half of the requests have a partner of the same wording."""
    known = Counter(sample.template for sample in harmless)
    inside = sum(known[sample.template] > 1 for sample in harmless)
    across = sum(known[sample.template] > 0 for sample in harmful)
    return 2 * inside >= len(harmless) and 2 * across >= len(harmful)


def _measure_gaps(
    groups: Groups,
    base: GroupStates,
    defended: Mapping[str, GroupStates],
    config: DiagnosisConfig,
) -> dict[str, LayerCurve]:
    """Return the gap of text, of pictures, and of pictures with each defense."""
    pairs = {medium: base.pair(medium) for medium in MEDIA}
    pairs |= {f"picture + {name}": states.pair("picture") for name, states in defended.items()}
    return {
        name: measure_angular_gap(
            *pair,
            name=name,
            same_wording=groups.same_wording,
            draws=config.bootstrap_draws,
            seed=config.seed,
        )
        for name, pair in pairs.items()
    }


def _gap_figure(
    gaps: Mapping[str, LayerCurve], band: tuple[int, int] | None, groups: Groups
) -> CurveFigure:
    pairs = "pairs of the same wording" if groups.same_wording else "pairs of any wording"
    return CurveFigure(
        key="angular_gap",
        title="How far harmful requests stand apart from harmless ones",
        axis="angle to harmful minus angle to other harmless requests",
        unit="°",
        note=f"Where text rises and pictures stay flat, the layers that recognise harm in words "
        f"do not recognise it in pictures. Taken over {pairs}; the marked layers are the "
        "safety layers of text.",
        curves=tuple(gaps.values()),
        variants=tuple(_variant_of(name) for name in gaps),
        band=band,
    )


def _variant_of(name: str) -> str:
    return name.partition(" + ")[2] or "base"


def _pair_figure(groups: Groups, base: GroupStates, config: DiagnosisConfig) -> CurveFigure:
    curves = []
    for medium in MEDIA:
        found = measure_pair_angles(
            *base.pair(medium),
            same_wording=groups.same_wording,
            draws=config.bootstrap_draws,
            seed=config.seed,
        )
        curves += [replace(curve, name=f"{medium}, {curve.name}") for curve in found]
    return CurveFigure(
        key="pair_angles",
        title="Angles between requests",
        axis="mean angle between two requests",
        unit="°",
        note="N-N: two harmless requests. N-M: a harmless and a harmful one. The figure above "
        "shows their difference.",
        curves=tuple(curves),
        variants=("base",) * len(curves),
    )


def _defense_figures(
    base: GroupStates,
    defended: Mapping[str, GroupStates],
    config: DiagnosisConfig,
    band: tuple[int, int] | None,
) -> list[CurveFigure]:
    figures = []
    for name, states in defended.items():
        (normal, harmful), (turned_normal, turned_harmful) = (
            one.pair("picture") for one in (base, states)
        )
        curves = (
            measure_activation_shift(
                normal,
                turned_normal,
                name="N-(N+d)",
                draws=config.bootstrap_draws,
                seed=config.seed,
            ),
            measure_activation_shift(
                harmful,
                turned_harmful,
                name="M-(M+d)",
                draws=config.bootstrap_draws,
                seed=config.seed,
            ),
            measure_shift_difference(
                (normal, turned_normal),
                (harmful, turned_harmful),
                name="difference",
                draws=config.bootstrap_draws,
                seed=config.seed,
            ),
        )
        figures.append(
            CurveFigure(
                key=f"activation_shift_{_slug(name)}",
                title=f"What {name} does to picture requests",
                axis="angle between the state without and with the defense",
                unit="°",
                note="N: harmless picture requests, M: harmful ones. A defense that switches the "
                "safety layers on turns M further than N there; one that acts on everything "
                "turns both alike.",
                curves=curves,
                variants=(name,) * len(curves),
                band=band,
            )
        )
    return figures


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name.lower())


def _shift_figures(
    base: GroupStates,
    defended: Mapping[str, GroupStates],
    config: DiagnosisConfig,
    band: tuple[int, int] | None,
) -> list[CurveFigure]:
    text = base.pair("text")
    found = {
        "base": measure_modality_shift(
            text, base.pair("picture"), name="base", draws=config.bootstrap_draws, seed=config.seed
        )
    }
    for name, states in defended.items():
        found[name] = measure_modality_shift(
            text, states.pair("picture"), name=name, draws=config.bootstrap_draws, seed=config.seed
        )
    texts = {
        "length": (
            "How far a picture moves the state",
            "length of the shift, as a share of the state's length",
            "The shift from a harmful request in words to the same request beside a picture.",
        ),
        "cosine": (
            "Which way a picture moves the state",
            "cosine with the refusal direction of text",
            (
                "Below zero the picture moves harmful requests away from refusing; near zero it "
                "moves them somewhere else altogether."
            ),
        ),
        "safety_signal": (
            "How much of the safety signal is left in pictures",
            "harmful minus harmless pictures along the refusal direction; text is 1",
            (
                "1: pictures are told apart along the direction that text uses as well as text "
                "is. 0: not at all."
            ),
        ),
    }
    return [
        CurveFigure(
            key=f"modality_shift_{key}" if key != "safety_signal" else key,
            title=title,
            axis=axis,
            unit="",
            note=note,
            curves=tuple(own[key] for own in found.values()),
            variants=tuple(found),
            band=band,
        )
        for key, (title, axis, note) in texts.items()
    ]


def _lens_figures(
    lens: Mapping[str, Mapping[str, LayerCurve]], band: tuple[int, int] | None
) -> list[CurveFigure]:
    named = [
        (variant, curve if variant == "base" else replace(curve, name=f"{medium} + {variant}"))
        for variant, curves in lens.items()
        for medium, curve in curves.items()
    ]
    if not named:
        return []
    return [
        CurveFigure(
            key="refusal_word_probability",
            title="Where the first word of a refusal comes up",
            axis="mean probability of a refusal's first word, read after each layer",
            unit="",
            note="The state after each layer is turned into a next word by the model's own head "
            "(logit lens), for harmful requests.",
            curves=tuple(curve for _, curve in named),
            variants=tuple(variant for variant, _ in named),
            band=band,
        )
    ]


def _caption_figures(
    vlm: VLM, groups: Groups, config: DiagnosisConfig, notes: list[str]
) -> list[CurveFigure]:
    """Compare pictures with their captions, where pictures become tokens."""
    samples = groups.samples["picture", True]
    try:
        gap = measure_modality_gap(vlm, samples, batch_size=config.batch_size)
    except SettingError as error:
        notes.append(f"Pictures and captions were not compared: {error}")
        return []
    curves = [
        _bare(name, values, gap.n)
        for name, values in (
            ("raw", gap.raw),
            ("own caption, centred", gap.centred),
            ("other captions, centred", gap.mismatched),
        )
    ]
    return [
        CurveFigure(
            key="caption_cosine",
            title="How alike a picture and its caption are",
            axis="cosine of the mean states of picture and caption",
            unit="",
            note="Centred: each medium's mean is subtracted first. Where a picture's own caption "
            "is no closer than another's, the layer does not know what the picture shows.",
            curves=tuple(curves),
            variants=("base",) * len(curves),
        )
    ]


def _measure_probes(
    vlm: VLM, groups: Groups, base: GroupStates, config: DiagnosisConfig
) -> tuple[list[CurveFigure], list[SiteFigure]]:
    """Fit probes of layers and of heads within each medium and across."""
    layers = base.states["text", True].layers
    by_layer = {medium: _join(base.pair(medium)) for medium in MEDIA}
    by_head = {
        medium: _capture_heads(vlm, groups, medium, layers, config.batch_size) for medium in MEDIA
    }
    found = _fit_all(by_layer, config.seed)
    curves = tuple(
        replace(_bare(name, one.accuracy, one.n), layers=layers) for name, one in found.items()
    )
    areas = tuple(
        replace(_bare(name, one.auc, one.n), layers=layers) for name, one in found.items()
    )
    heads = len(next(iter(by_head.values())).features[0]) // len(layers)
    maps = {
        name: [list(one.accuracy[i * heads : (i + 1) * heads]) for i in range(len(layers))]
        for name, one in _fit_all(by_head, config.seed).items()
    }
    note = (
        "Logistic probes tell harmful from harmless requests; things in the test were never in "
        "the fit. 0.5 is chance."
    )
    figures = [
        CurveFigure(key, title, axis, "", f"{note}{more}", own, ("base",) * len(own))
        for key, title, axis, more, own in (
            ("probe_accuracy", "What probes read from each layer", "balanced accuracy", "", curves),
            (
                "probe_auc",
                "Whether the direction carries over",
                "area under the ROC curve",
                " The area ignores a shift that moves all pictures alike.",
                areas,
            ),
        )
    ]
    title = "What probes read from each head"
    return figures, [
        SiteFigure("head_accuracy", title, note, layers, maps, next(iter(found.values())).n)
    ]


def _fit_all(media: Mapping[str, SiteFeatures], seed: int) -> dict[str, ProbeMap]:
    return {
        f"{fitted} to {tested}": measure_probe_map(
            media[fitted], media[tested], name=f"{fitted} to {tested}", seed=seed
        )
        for fitted in MEDIA
        for tested in MEDIA
    }


def _join(pair: tuple[PromptStates, PromptStates]) -> SiteFeatures:
    return _label([one.states.transpose(0, 1) for one in pair], [one.clusters for one in pair])


def _capture_heads(
    vlm: VLM, groups: Groups, medium: str, layers: Sequence[int], batch_size: int
) -> SiteFeatures:
    parts, names = [], []
    for side in (False, True):
        samples = groups.samples[medium, side]
        found = capture_activations(
            vlm, samples, places=("heads",), layers=layers, batch_size=batch_size
        )
        parts.append(found.tensors["heads"].flatten(1, 2))
        names.append(tuple(sample.concept or sample.id for sample in samples))
    return _label(parts, names)


def _label(
    parts: Sequence[Float[Tensor, "_ sites width"]], names: Sequence[tuple[str, ...]]
) -> SiteFeatures:
    labels = torch.tensor([side for side in (False, True) for _ in names[side]])
    return SiteFeatures(torch.cat(list(parts)), labels, names[0] + names[1])


def _draw_points(base: GroupStates, gap: LayerCurve, config: DiagnosisConfig) -> list[PointFigure]:
    """Lay the states flat at the layer in which text stands apart the most."""
    place = max(range(len(gap.values)), key=lambda i: gap.values[i])
    layer = gap.layers[place]
    parts = {
        f"{'harmful' if side else 'harmless'} {medium}": base.states[medium, side].states[place]
        for medium in MEDIA
        for side in (False, True)
    }
    notes = {
        "pca": "The two directions in which these states differ most (PCA).",
        "tsne": "Neighbours stay neighbours (t-SNE); distances between clouds mean nothing.",
    }
    figures = []
    for kind, note in notes.items():
        flat = project_states(torch.cat(list(parts.values())), kind=kind, seed=config.seed)
        rows = flat.tolist()
        parts_of: dict[str, list[list[float]]] = {}
        for name, states in parts.items():
            parts_of[name] = rows[: len(states)]
            rows = rows[len(states) :]
        figures.append(
            PointFigure(f"states_{kind}", f"The states after layer {layer}", note, parts_of)
        )
    return figures


def _run_sweep(
    vlm: VLM,
    groups: Groups,
    band: SafetyRange | None,
    config: DiagnosisConfig,
    notes: list[str],
) -> BoundSweep | None:
    """Scale the safety layers and move their bounds to where refusals change most."""
    samples = groups.samples["text", False][: config.sweep_samples]
    if band is None or not samples:
        return None
    counts: dict[tuple[int, int, float], int] = {}

    def count(first: int, last: int, alpha: float) -> int:
        key = (first, last, alpha)
        if key not in counts:
            with scaled_layers(vlm, first, last, alpha):
                answers = generate_answers(
                    vlm,
                    [sample.prompt for sample in samples],
                    [[] for _ in samples],
                    max_new_tokens=config.sweep_tokens,
                    batch_size=config.batch_size,
                )
            counts[key] = sum(score_refusal(answer).is_refusal for answer in answers)
        return counts[key]

    num_layers = vlm.layout.num_layers
    is_raised = 2 * count(band.first, band.last, 1.0) <= len(samples)
    tried = choose_alpha(
        count,
        band.first,
        band.last,
        num_layers=num_layers,
        least_spread=_SPREAD_SHARE * len(samples),
        is_raised=is_raised,
        most_steps=6,
    )
    if tried[-1].spread == 0:
        notes.append(
            "The scaling test changed no answer, so it says nothing about the bounds of the "
            "safety layers."
        )
        return None
    return refine_range(count, band.first, band.last, num_layers=num_layers, alpha=tried[-1].alpha)


def _list_range_records(
    ranges: Mapping[str, SafetyRange | None], sweep: BoundSweep | None, config: DiagnosisConfig
) -> list[Record]:
    """Return the bounds as records; a medium without safety layers has none."""

    def make(variant: str, setting: str, metric: str, value: int) -> Record:
        number = float(value)
        return Record(
            variant, setting, metric, config.split, number, number, number,
            config.layer_samples, (config.seed,),
        )  # fmt: skip

    records = []
    for name, band in ranges.items():
        if band is not None:
            setting = "text" if name == "text" else "picture"
            for metric in ("first", "last", "peak"):
                value = getattr(band, metric)
                records.append(make(_variant_of(name), setting, f"safety_layer_{metric}", value))
    if sweep is not None:
        for metric in ("first", "last"):
            value = getattr(sweep, metric)
            records.append(make("base", "text, scaled", f"safety_layer_{metric}", value))
    return records


def _bare(name: str, values: Sequence[float], n: int) -> LayerCurve:
    """Return a curve without a band."""
    own = tuple(values)
    return LayerCurve(name, own, own, own, n, tuple(range(len(own))))
