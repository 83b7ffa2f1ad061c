"""The guide loss and the answer loss of text-guided alignment, as pure functions."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Final, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from safebridge.models.tokens import IGNORED_LABEL

__all__ = ["GuideTerms", "answer_cross_entropy", "build_batches", "guide_terms", "pool_span"]

_REPOSITORY_ALIGN: Final = 0.25
_REPOSITORY_PAIR: Final = 0.10
_LEAST_DISTANCE: Final = 1e-3
"""Share of its length by which a caption must differ from the mean to have a direction from it."""
_JITTER: Final = 0.25  # relative noise on the lengths, so that batches differ between epochs


@final
@dataclass(frozen=True)
class GuideTerms:
    """The two terms of the guide loss, each one value per sample."""

    align: Float[Tensor, " batch"]
    """Draws a picture to its caption; 0 where a span is empty."""

    pair: Float[Tensor, " batch"]
    """Keeps a picture closer to its caption than the retrieved text is; 0 where a span is empty."""

    is_aligned: Bool[Tensor, " batch"]
    """Whether the sample has both a picture and a caption."""

    is_paired: Bool[Tensor, " batch"]
    """Whether it has a retrieved text besides."""

    cosine: Float[Tensor, " batch"]
    """Cosine of picture and caption, mean over the layers, without a graph."""


def pool_span(
    hidden: Float[Tensor, "batch seq hidden"],
    span: Bool[Tensor, "batch seq"],
    *,
    pooling: str = "mean",
) -> Float[Tensor, "batch hidden"]:
    """Make one vector of the states of a span, in float32.

    Args:
        hidden: States of one decoder layer.
        span: True at the tokens that count; no padding and no template.
        pooling: "mean" or "last" (the span's last token).

    Returns:
        One vector for each row; zeros where the span is empty.
    """
    if pooling == "last":
        columns = torch.arange(span.shape[1], device=span.device)
        is_last = columns == (columns * span).amax(dim=1, keepdim=True)
        span = span & is_last
    weights = span.float()
    weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1.0)
    # A weight of zero must also silence what padding may hold, which can be anything.
    kept = hidden.float().masked_fill(~span[..., None], 0.0)
    return torch.einsum("bs,bsh->bh", weights, kept)


def guide_terms(
    image: Float[Tensor, "layers batch hidden"],
    caption: Float[Tensor, "layers batch hidden"],
    retrieved: Float[Tensor, "layers batch hidden"] | None,
    *,
    form: str = "paper",
    reduction: str = "mean",
    centre: str = "none",
    progress: float = 0.0,
) -> GuideTerms:
    r"""Compute the guide loss of each sample from pooled states.

    With $c_j = \cos(I_j, C_j)$ and $r_j = \cos(R_j, C_j)$ in layer $j$, the align term is
    $-c_j$ ("paper") or $0.25\,(1 - \tau)\,e^{-c_j}$ ("repository"), and the pair term
    $\log(1 + e^{-(c_j - r_j)})$ or $0.1\,(1 - \tau)^2\,e^{r_j - c_j}$. Nothing is computed
    in Python numbers, so both have gradients; the caption's has been stopped where it was
    computed.

    Args:
        image: Pooled states of the pictures. A sample without a picture has zeros.
        caption: Pooled states of the captions; zeros without one.
        retrieved: Pooled states of the retrieved texts, or None for no pair term.
        form: "paper" or "repository".
        reduction: "mean" or "sum" over the layers.
        centre: "none", or "captions" to subtract the mean of the batch's captions, layer by
            layer, from all states first. What all states of a layer share then counts for
            nothing; a caption that is the mean has no direction, and its sample no terms.
        progress: The share $\tau$ of the run that is over, in [0, 1]; for the repository's
            falling weights.

    Returns:
        Both terms by sample. An empty span gives 0 and no gradient, never NaN.

    Source:
        Xu et al. 2024, "Cross-Modal Safety Mechanism Transfer in Large Vision-Language
        Models" (arXiv:2410.12662) for the paper's form, which sums over the layers; the
        repository xsc1234/VLM_Safety_Transfer for the other, which takes their mean, and
        there has no gradient at all. `centre` is ours.
    """
    is_aligned = _is_filled(image) & _is_filled(caption)
    is_retrieved = is_aligned if retrieved is None else _is_filled(retrieved)
    if centre == "captions" and bool(is_aligned.any()):
        mean = caption[:, is_aligned].mean(dim=1, keepdim=True).detach()
        distance = (caption - mean).norm(dim=-1) / caption.norm(dim=-1).clamp(min=1e-9)
        is_aligned = is_aligned & (distance > _LEAST_DISTANCE).all(dim=0)
        image, caption = image - mean, caption - mean
        retrieved = None if retrieved is None else retrieved - mean
    near = _cosine(image, caption, is_aligned)
    if retrieved is None:
        is_paired, far = torch.zeros_like(is_aligned), torch.zeros_like(near)
    else:
        is_paired = is_aligned & is_retrieved
        far = _cosine(retrieved, caption, is_paired)
    if form == "paper":
        align, pair = -near, functional.softplus(far - near)
    else:
        align = _REPOSITORY_ALIGN * (1 - progress) * torch.exp(-near)
        pair = _REPOSITORY_PAIR * (1 - progress) ** 2 * torch.exp(far - near)
    reduce = torch.sum if reduction == "sum" else torch.mean
    return GuideTerms(
        align=reduce(align, dim=0).masked_fill(~is_aligned, 0.0),
        pair=reduce(pair, dim=0).masked_fill(~is_paired, 0.0),
        is_aligned=is_aligned,
        is_paired=is_paired,
        cosine=near.detach().mean(dim=0),
    )


def answer_cross_entropy(
    logits: Float[Tensor, "batch seq vocab"], labels: Int[Tensor, "batch seq"]
) -> Float[Tensor, ""]:
    """Compute the mean cross-entropy over all answer tokens of a batch.

    Args:
        logits: Predictions; the one at a position is for the token after it.
        labels: The answer tokens and -100 elsewhere, at their own positions.
    """
    wanted = labels[:, 1:]
    is_wanted = wanted.ne(IGNORED_LABEL)
    return functional.cross_entropy(logits[:, :-1][is_wanted].float(), wanted[is_wanted])


def build_batches(
    lengths: Sequence[int], groups: Sequence[Hashable], batch_size: int, seed: int
) -> list[list[int]]:
    """Deal samples into batches of one group and of similar length, in a random order.

    Args:
        lengths: Length of each sample, in any unit.
        groups: Samples of different groups never share a batch.
        batch_size: Samples in a batch; the last one of a group may have fewer.
        seed: Seed of the order and of who meets whom.

    Returns:
        Indices of samples, each exactly once.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(len(lengths), generator=generator).tolist()
    members: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    batches: list[list[int]] = []
    for own in members.values():
        own.sort(key=lambda index: lengths[index] * (1 + _JITTER * noise[index]))
        batches += [own[i : i + batch_size] for i in range(0, len(own), batch_size)]
    shuffled = torch.randperm(len(batches), generator=generator).tolist()
    return [batches[index] for index in shuffled]


def _is_filled(pooled: Float[Tensor, "layers batch hidden"]) -> Bool[Tensor, " batch"]:
    """Say which rows had tokens in their span: others were pooled to zeros."""
    return pooled.detach().ne(0).flatten(2).any(dim=-1).any(dim=0)


def _cosine(
    left: Float[Tensor, "layers batch hidden"],
    right: Float[Tensor, "layers batch hidden"],
    is_filled: Bool[Tensor, " batch"],
) -> Float[Tensor, "layers batch"]:
    """Return cosines where both are filled, and zeros without a gradient elsewhere."""
    # The cosine of zeros has no gradient, so such rows are replaced before and zeroed after.
    safe = torch.ones_like(left)
    cosine = functional.cosine_similarity(
        torch.where(is_filled[:, None], left, safe),
        torch.where(is_filled[:, None], right, safe),
        dim=-1,
    )
    return cosine.masked_fill(~is_filled, 0.0)
