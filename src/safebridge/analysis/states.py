"""States at the end of prompts, layer by layer, with what the prompts have in common."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from safebridge.activations.capture import capture_activations
from safebridge.activations.sites import find_layers
from safebridge.data.sample import Sample
from safebridge.errors import ShapeError
from safebridge.models.load import VLM

__all__ = ["PromptStates", "capture_states", "join_states"]


@final
@dataclass(frozen=True, eq=False)
class PromptStates:
    """The residual stream after decoder layers, at the last token of prompts."""

    states: Float[Tensor, "layers n hidden"]
    """States in float32 on the CPU."""

    layers: tuple[int, ...]
    """The decoder layers, from 0."""

    wordings: tuple[str, ...]
    """The template of each prompt; prompts of one template differ in their object only."""

    clusters: tuple[str, ...]
    """What each prompt is about; prompts about the same thing are not independent."""

    @property
    def n(self) -> int:
        """Number of prompts."""
        return len(self.clusters)


def capture_states(
    vlm: VLM,
    samples: Sequence[Sample],
    *,
    batch_size: int = 16,
    layers: Sequence[int] | None = None,
) -> PromptStates:
    """Capture the residual stream at the end of every prompt.

    Inside a method's `apply` these are the states of the defended model.

    Args:
        vlm: The model; it is as it was afterwards.
        samples: Requests, with or without pictures.
        batch_size: Requests in one forward pass.
        layers: Decoder layers; None takes those that run with and without a picture, so that
            the states of text and pictures fit together.

    Raises:
        DataError: If there are no samples.
    """
    chosen = find_layers(vlm, is_text_only=True) if layers is None else tuple(layers)
    found = capture_activations(vlm, samples, layers=chosen, batch_size=batch_size)
    return PromptStates(
        states=found.tensors["resid_out"].transpose(0, 1).contiguous(),
        layers=found.layers,
        wordings=tuple(sample.template or sample.id for sample in samples),
        clusters=tuple(sample.concept or sample.id for sample in samples),
    )


def join_states(*groups: PromptStates) -> PromptStates:
    """Put the prompts of several groups behind each other.

    Args:
        groups: States of one model.

    Raises:
        ShapeError: If they are of different layers or widths.
    """
    check_same_model(*groups)
    return PromptStates(
        states=torch.cat([group.states for group in groups], dim=1),
        layers=groups[0].layers,
        wordings=tuple(wording for group in groups for wording in group.wordings),
        clusters=tuple(cluster for group in groups for cluster in group.clusters),
    )


def check_same_model(*groups: PromptStates) -> None:
    """Refuse states that were not captured at the same places of one model.

    Args:
        groups: The states.

    Raises:
        ShapeError: If layers or widths differ.
    """
    for group in groups[1:]:
        if group.layers != groups[0].layers or group.states.shape[2] != groups[0].states.shape[2]:
            raise ShapeError(
                f"states of shape {tuple(groups[0].states.shape)} and {tuple(group.states.shape)} "
                "come from different models or layers; record both with the same one."
            )
