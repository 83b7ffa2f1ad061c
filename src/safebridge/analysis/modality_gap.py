"""How far apart a picture and its caption are in every layer, and how that goes with refusal."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from safebridge.data.sample import Sample, open_images
from safebridge.errors import DataError, SettingError, ShapeError
from safebridge.methods.text_guided_alignment.states import (
    capture_layers,
    capture_text_states,
    pool_layers,
    shorten_logits,
)
from safebridge.models.load import VLM
from safebridge.models.tokens import encode

__all__ = [
    "ModalityGap",
    "capture_pairs",
    "compare_states",
    "measure_modality_gap",
    "paired_cosines",
]


@final
@dataclass(frozen=True)
class ModalityGap:
    """Cosines of pictures and captions by layer; layers count from 0."""

    raw: tuple[float, ...]
    """Mean cosine of a picture's and its caption's mean state."""

    centred: tuple[float, ...]
    """The same after each modality's mean over all samples is subtracted. A few very large
    features decide the raw cosine in the middle layers; this one says whether a picture is
    like its own caption."""

    mismatched: tuple[float, ...]
    """Centred as well, but with other samples' captions: what a picture and any caption have in
    common. `centred` means something where it is above this."""

    refused: tuple[float, ...] | None
    """Mean centred cosine of the pictures that were refused, if that was given."""

    answered: tuple[float, ...] | None
    """That of the pictures that were not."""

    correlation: tuple[float, ...] | None
    """Correlation of centred cosine and refusal over the samples, in [-1, 1]; 0 where one of the
    two does not vary."""

    n: int
    """Number of pairs."""

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self)


def measure_modality_gap(
    vlm: VLM,
    samples: Sequence[Sample],
    *,
    is_refused: Sequence[bool] | None = None,
    batch_size: int = 8,
) -> ModalityGap:
    """Compare what decoder layers make of pictures and of their captions.

    A picture is read in its own prompt, a caption alone without any picture; image tokens
    and the caption's own tokens are pooled, nothing else.

    Args:
        vlm: The model; with an applied method, the model as defended.
        samples: Requests with pictures and captions, two or more.
        is_refused: Whether the model refused each of them.
        batch_size: Pictures in one pass.

    Returns:
        Cosines by layer, and how they go with refusal.

    Raises:
        DataError: If a sample lacks a picture or a caption, or there are too few.
        SettingError: If the model's pictures have no tokens.

    Source:
        Xu et al. 2024 (arXiv:2410.12662), analysis of hidden states. Centring, mismatched
        pairs and exact spans are ours; the authors' text span holds template tokens too.
    """
    image, caption = capture_pairs(vlm, samples, batch_size=batch_size)
    return compare_states(image, caption, is_refused=is_refused)


def capture_pairs(
    vlm: VLM, samples: Sequence[Sample], *, batch_size: int = 8
) -> tuple[Float[Tensor, "layers n hidden"], Float[Tensor, "layers n hidden"]]:
    """Return the mean states of pictures and of their captions, on the CPU.

    Args:
        vlm: The model.
        samples: Requests with pictures and captions.
        batch_size: Pictures in one pass.

    Raises:
        DataError: If a sample lacks a picture or a caption.
        SettingError: If the model's pictures have no tokens.
    """
    if vlm.layout.cross_attention_layers or vlm.layout.image_token_id is None:
        raise SettingError(
            f"{vlm.name} reads pictures by cross-attention, so there are no states of a picture "
            "to compare. Use a model whose pictures become tokens."
        )
    for sample in samples:
        if not sample.images or not sample.caption:
            raise DataError(f"sample '{sample.id}' needs a picture and a caption to compare.")
    layers = range(vlm.layout.num_layers)
    pictures: list[Tensor] = []
    captions: list[Tensor] = []
    for part in _parts(samples, batch_size):
        encoded = encode(vlm, [s.prompt for s in part], [open_images(s) for s in part])
        with torch.no_grad(), capture_layers(vlm, layers) as states:
            vlm.model(**encoded.inputs, use_cache=False, **shorten_logits(vlm, 1))
            pictures.append(pool_layers(states, encoded.spans.image).cpu())
        captions.append(capture_text_states(vlm, [s.caption for s in part], layers).cpu())
    if not pictures:
        raise DataError("no samples to compare. Pass requests with pictures and captions.")
    return torch.cat(pictures, dim=1), torch.cat(captions, dim=1)


def compare_states(
    image: Float[Tensor, "layers n hidden"],
    caption: Float[Tensor, "other_layers m other_hidden"],
    *,
    is_refused: Sequence[bool] | None = None,
) -> ModalityGap:
    """Compute the gap from states that were captured already.

    Args:
        image: Mean states of the pictures.
        caption: Mean states of their captions, in the same order.
        is_refused: Whether the model refused each picture.

    Raises:
        DataError: If there are fewer than two pairs.
        ShapeError: If the two, or the refusals, differ in number.
    """
    n = image.shape[1]
    if image.shape != caption.shape or (is_refused is not None and len(is_refused) != n):
        raise ShapeError(
            f"states of shape {tuple(image.shape)} and {tuple(caption.shape)}"
            f"{'' if is_refused is None else f' and {len(is_refused)} refusals'} do not belong "
            "together. Capture them from the same samples."
        )
    if n < 2:  # noqa: PLR2004 - a mean is subtracted
        raise DataError(f"a gap needs two pairs or more, found {n}.")
    cosines = paired_cosines(image, caption, is_centred=True)
    shifted = [caption.roll(shift, dims=1) for shift in range(1, min(n, 8))]
    other = torch.stack([paired_cosines(image, own, is_centred=True) for own in shifted])
    sides: dict[bool, tuple[float, ...] | None] = {True: None, False: None}
    correlation = None
    if is_refused is not None:
        flags = torch.tensor(list(is_refused))
        correlation = tuple(_correlate(cosines, flags).tolist())
        for side in sides:
            chosen = cosines[:, flags == side]
            sides[side] = tuple(chosen.mean(dim=1).tolist()) if chosen.shape[1] else None
    return ModalityGap(
        raw=tuple(paired_cosines(image, caption).mean(dim=1).tolist()),
        centred=tuple(cosines.mean(dim=1).tolist()),
        mismatched=tuple(other.mean(dim=(0, 2)).tolist()),
        refused=sides[True],
        answered=sides[False],
        correlation=correlation,
        n=n,
    )


def paired_cosines(
    image: Float[Tensor, "layers n hidden"],
    caption: Float[Tensor, "layers n hidden"],
    *,
    is_centred: bool = False,
) -> Float[Tensor, "layers n"]:
    """Return each pair's cosine in each layer.

    Args:
        image: Mean states of the pictures.
        caption: Mean states of their captions.
        is_centred: Subtract each modality's mean over the pairs first.
    """
    left, right = image.double(), caption.double()
    if is_centred:
        left, right = left - left.mean(dim=1, keepdim=True), right - right.mean(dim=1, keepdim=True)
    return functional.cosine_similarity(left, right, dim=-1).float()


def _correlate(cosines: Float[Tensor, "layers n"], is_refused: Tensor) -> Float[Tensor, " layers"]:
    """Return Pearson's correlation of cosine and refusal in each layer."""
    x = cosines.double() - cosines.double().mean(dim=1, keepdim=True)
    y = is_refused.double() - is_refused.double().mean()
    norm = x.norm(dim=1) * y.norm()
    return torch.where(norm > 0, (x @ y) / norm.clamp(min=1e-300), 0.0).float()


def _parts(samples: Sequence[Sample], size: int) -> Iterator[Sequence[Sample]]:
    for start in range(0, len(samples), size):
        yield samples[start : start + size]
