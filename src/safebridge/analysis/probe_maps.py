"""Probe maps: how well a probe reads harmfulness at each layer or head, within and across media."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

import torch
from jaxtyping import Bool, Float
from scipy import stats
from torch import Tensor

from safebridge.activations.probes import fit_probes
from safebridge.errors import DataError

__all__ = ["ProbeMap", "SiteFeatures", "measure_probe_map"]

_MOST_FOLDS: Final = 5


@final
@dataclass(frozen=True, eq=False)
class SiteFeatures:
    """Activations of labelled prompts at many sites."""

    features: Float[Tensor, "n sites width"]
    """Activations; a site is a layer, or a head of a layer."""

    is_harmful: Bool[Tensor, " n"]
    """The class of each prompt."""

    groups: tuple[str, ...]
    """What each prompt is about. One thing is never in the fit and in the test."""


@final
@dataclass(frozen=True)
class ProbeMap:
    """What probes found, one number for each site."""

    name: str
    """What was fitted and tested on what, e.g. "text to picture"."""

    accuracy: tuple[float, ...]
    """Balanced accuracy on held-out things, 0.5 is chance."""

    auc: tuple[float, ...]
    """Area under the ROC curve. It does not see a shift that moves all prompts alike, so a high
    area with a low accuracy means that the direction carries over and the threshold does not."""

    n: int
    """Prompts tested, each once."""


def measure_probe_map(
    fitted_on: SiteFeatures,
    tested_on: SiteFeatures,
    *,
    name: str,
    folds: int = _MOST_FOLDS,
    seed: int = 0,
) -> ProbeMap:
    """Fit a logistic probe at every site in one medium and test it in the same or another one.

    Things are dealt into folds; the probes of a fold are fitted on prompts about all other
    things and tested on prompts about its own, so naming a thing does not help.

    Args:
        fitted_on: Prompts to fit on, e.g. text.
        tested_on: Prompts to test on, e.g. pictures; may be the same.
        name: Name of the map.
        folds: Number of folds; fewer if there are fewer things of a class.
        seed: Seed of the deal.

    Raises:
        DataError: If a class has fewer than two things, or the sites differ.
    """
    if fitted_on.features.shape[1:] != tested_on.features.shape[1:]:
        raise DataError(
            f"probes of {tuple(fitted_on.features.shape[1:])} sites and features cannot be tested "
            f"on {tuple(tested_on.features.shape[1:])}. Capture both at the same places."
        )
    fold_of = _deal(fitted_on, tested_on, folds, seed)
    count = 1 + max(fold_of.values())
    own = torch.tensor([fold_of[group] for group in fitted_on.groups])
    other = torch.tensor([fold_of[group] for group in tested_on.groups])
    logits = torch.full(tested_on.features.shape[:2], torch.nan, dtype=torch.float64)
    for fold in range(count):
        is_in, is_out = other == fold, own != fold
        if not bool(is_in.any()):
            continue
        probes = fit_probes(fitted_on.features[is_out], fitted_on.is_harmful[is_out])
        logits[is_in] = probes.logits(tested_on.features[is_in]).cpu()
    labels = tested_on.is_harmful
    return ProbeMap(
        name=name,
        accuracy=tuple(_balanced_accuracy(logits, labels).tolist()),
        auc=tuple(_auc(logits, labels)),
        n=len(labels),
    )


def _deal(
    fitted_on: SiteFeatures, tested_on: SiteFeatures, folds: int, seed: int
) -> dict[str, int]:
    """Deal the things of each class out to the folds evenly."""
    classes: dict[bool, list[str]] = {True: [], False: []}
    for part in (fitted_on, tested_on):
        for group, is_harmful in zip(part.groups, part.is_harmful.tolist(), strict=True):
            if group not in classes[is_harmful]:
                classes[is_harmful].append(group)
    least = min(len(groups) for groups in classes.values())
    if least < 2:  # noqa: PLR2004 - one to fit on, one to test on
        raise DataError(
            f"probes need two harmful and two harmless things or more, found {len(classes[True])} "
            f"and {len(classes[False])}. Raise layer_samples."
        )
    generator = torch.Generator().manual_seed(seed)
    fold_of: dict[str, int] = {}
    for groups in classes.values():
        for place, index in enumerate(torch.randperm(len(groups), generator=generator).tolist()):
            fold_of.setdefault(groups[index], place % min(folds, least))
    return fold_of


def _balanced_accuracy(
    logits: Float[Tensor, "n sites"], labels: Bool[Tensor, " n"]
) -> Float[Tensor, " sites"]:
    hits = ((logits > 0) == labels[:, None]).double()
    return (hits[labels].mean(dim=0) + hits[~labels].mean(dim=0)) / 2


def _auc(logits: Float[Tensor, "n sites"], labels: Bool[Tensor, " n"]) -> Sequence[float]:
    """Return Mann and Whitney's U over the number of pairs; ties count half."""
    found = stats.mannwhitneyu(logits[labels].numpy(), logits[~labels].numpy(), axis=0)
    pairs = int(labels.sum()) * int((~labels).sum())
    return [float(value) / pairs for value in found.statistic]
