"""Where the demo's requests come from: the shipped twins, or anything that offers the same."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from safebridge.data.sample import Sample
from safebridge.data.source import TwinSource
from safebridge.data.triad import draw_evenly, match_benign
from safebridge.demo.config import DemoConfig

__all__ = ["Plan", "choose_samples"]

Cell = tuple[str, str]
"""A metric and the part of the data it is measured on, e.g. ("image_refusal_rate", "seen")."""


@dataclass(frozen=True)
class Plan:
    """The requests of one run; the base model and the defended one get the same."""

    cells: Mapping[Cell, Sequence[Sample]]
    """Held-out requests by what is measured on them."""

    harmful: Sequence[Sample]
    """Harmful picture requests for the fit, of seen categories only."""

    twins: Sequence[Sample]
    """Harmless picture requests for the fit, worded like the harmful ones."""

    general: Sequence[Sample]
    """General picture requests for the fit."""

    texts: Sequence[Sample]
    """Harmful requests in text, whose refusals the fit learns from."""


def choose_samples(source: TwinSource, config: DemoConfig) -> Plan:
    """Draw the requests of a run.

    Args:
        source: Where to draw from; "test" for measuring and "fit" for fitting.
        config: How many of each.
    """
    seed = config.seed

    def test(kind: str, limit: int, categories: str = "all") -> list[Sample]:
        return source.load_samples(kind, "test", limit=limit, seed=seed, categories=categories)

    def fit(kind: str, limit: int | None, categories: str = "all") -> list[Sample]:
        return source.load_samples(kind, "fit", limit=limit, seed=seed, categories=categories)

    cells: dict[Cell, Sequence[Sample]] = {}
    for part in ("seen", "unseen"):
        cells["text_refusal_rate", part] = test("harmful_text", config.harmful_samples, part)
        cells["image_refusal_rate", part] = test("harmful_image", config.harmful_samples, part)
    cells["over_refusal_rate", "all"] = test("benign_image", config.benign_samples)
    cells["text_over_refusal_rate", "all"] = test("benign_text", config.benign_samples)
    cells["naming_accuracy", "all"] = test("naming", config.naming_samples)
    harmful = draw_evenly(fit("harmful_image", None, "seen"), config.fit_harmful, seed=seed)
    return Plan(
        cells=cells,
        harmful=harmful,
        twins=match_benign(harmful, fit("benign_image", None), config.fit_twins, seed=seed),
        general=fit("general", config.fit_general),
        texts=fit("harmful_text", config.fit_texts, "seen"),
    )
