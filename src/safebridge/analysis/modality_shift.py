"""What a picture does to the state at the end of a request: how far it moves, and which way."""

from collections.abc import Callable
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor

from safebridge.analysis.curves import LayerCurve, bootstrap_curve
from safebridge.analysis.states import PromptStates, check_same_model

__all__ = ["SHIFT_CURVES", "measure_modality_shift"]

SHIFT_CURVES: Final = ("length", "cosine", "safety_signal")
"""`length`: of the shift, as a share of the mean length of text states. `cosine`: of the shift of
harmful requests with the refusal direction. `safety_signal`: how much of the distance between
harmless and harmful text is left between harmless and harmful pictures, along that direction."""


def measure_modality_shift(
    text: tuple[PromptStates, PromptStates],
    picture: tuple[PromptStates, PromptStates],
    *,
    name: str,
    draws: int = 200,
    seed: int = 0,
) -> dict[str, LayerCurve]:
    r"""Measure the shift from text to pictures in every layer.

    With the class means $\mu$, the refusal direction is $r = \mu^{text}_{harmful} -
    \mu^{text}_{harmless}$ and the shift $m = \mu^{picture}_{harmful} - \mu^{text}_{harmful}$.
    The curves are $|m| / \overline{|x^{text}|}$, $\cos(m, r)$, and $\langle
    \mu^{picture}_{harmful} - \mu^{picture}_{harmless}, r \rangle / |r|^2$, which is 1 where
    pictures are told apart as well as text and 0 where they are not told apart at all.

    Args:
        text: States of harmless and harmful requests in text.
        picture: States of harmless and harmful requests with pictures.
        name: Name of the curves.
        draws: Number of bootstrap draws over clusters of prompts.
        seed: Seed of these draws.

    Returns:
        One curve for each of `SHIFT_CURVES`.

    Raises:
        ShapeError: If the states come from different models or layers.

    Source:
        Li et al. 2025, "Internal Activation Revision" (arXiv:2501.16378), states the shift and
        shows it by t-SNE; these three numbers are ours.
    """
    groups = (*text, *picture)
    check_same_model(*groups)
    lengths = [group.states.norm(dim=-1).T for group in groups]

    def means(weights: list[Tensor]) -> list[Float[Tensor, "draws layers hidden"]]:
        return [
            torch.einsum("dn,lnh->dlh", own, group.states) / own.sum(dim=1)[:, None, None]
            for own, group in zip(weights, groups, strict=True)
        ]

    def length(weights: list[Tensor]) -> Tensor:
        _, harmful_text, _, harmful_picture = means(weights)
        share = (weights[1] @ lengths[1]) / weights[1].sum(dim=1, keepdim=True)
        moved: Tensor = (harmful_picture - harmful_text).norm(dim=-1) / share
        return moved

    def cosine(weights: list[Tensor]) -> Tensor:
        harmless, harmful, _, shown = means(weights)
        moved, refusal = shown - harmful, harmful - harmless
        found: Tensor = torch.nn.functional.cosine_similarity(moved, refusal, dim=-1)
        return found

    def safety_signal(weights: list[Tensor]) -> Tensor:
        harmless, harmful, shown_harmless, shown_harmful = means(weights)
        refusal = harmful - harmless
        return ((shown_harmful - shown_harmless) * refusal).sum(-1) / refusal.square().sum(-1)

    measures: dict[str, Callable[[list[Tensor]], Tensor]] = {
        "length": length,
        "cosine": cosine,
        "safety_signal": safety_signal,
    }
    return {
        key: bootstrap_curve(
            measure,
            [group.clusters for group in groups],
            name=name,
            layers=text[0].layers,
            draws=draws,
            seed=seed,
        )
        for key, measure in measures.items()
    }
