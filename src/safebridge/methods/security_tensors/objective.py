"""The losses of a security tensor and the order of its batches, as pure functions."""

from collections.abc import Hashable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

__all__ = [
    "answer_cross_entropy",
    "answer_forward_kl",
    "answer_top_k_kl",
    "build_batches",
    "keep_first_labels",
    "keep_top_k",
]

_JITTER = 0.25  # relative noise on the lengths, so that batches differ between epochs


def answer_cross_entropy(
    logits: Float[Tensor, "tokens vocab"],
    targets: Int[Tensor, " tokens"],
    rows: Int[Tensor, " tokens"],
    batch: int,
) -> Float[Tensor, " batch"]:
    """Compute each sample's mean cross-entropy over its answer tokens.

    Args:
        logits: Predictions at the answer tokens of all samples, one after the other.
        targets: The answer tokens.
        rows: Which sample each token belongs to.
        batch: Number of samples.
    """
    losses = functional.cross_entropy(logits.float(), targets, reduction="none")
    return _mean_by_row(losses, rows, batch)


def answer_forward_kl(
    logits: Float[Tensor, "tokens vocab"],
    reference: Float[Tensor, "tokens vocab"],
    rows: Int[Tensor, " tokens"],
    batch: int,
) -> Float[Tensor, " batch"]:
    r"""Compute each sample's mean forward KL over its answer tokens.

    Computes $\sum_v p_0(v) (\log p_0(v) - \log p(v))$ with $p_0$ of the undefended model.

    Args:
        logits: Predictions with the security tensor.
        reference: Predictions of the undefended model at the same tokens.
        rows: Which sample each token belongs to.
        batch: Number of samples.
    """
    losses = functional.kl_div(
        logits.float().log_softmax(-1),
        reference.float().log_softmax(-1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    return _mean_by_row(losses, rows, batch)


def keep_top_k(
    logits: Float[Tensor, "tokens vocab"], top_k: int
) -> tuple[Float[Tensor, "tokens kept"], Int[Tensor, "tokens top"]]:
    """Keep the likeliest tokens of distributions, and what is left to all others.

    Args:
        logits: Predictions.
        top_k: How many tokens to keep; at most all but one.

    Returns:
        Log-probabilities of the kept tokens with that of all others as a last column, and
        the kept tokens.
    """
    log_probs = logits.float().log_softmax(-1)
    ids = log_probs.topk(min(top_k, log_probs.shape[-1] - 1), dim=-1).indices
    return _coarse(log_probs, ids), ids


def answer_top_k_kl(
    logits: Float[Tensor, "tokens vocab"],
    log_probs: Float[Tensor, "tokens kept"],
    ids: Int[Tensor, "tokens top"],
    rows: Int[Tensor, " tokens"],
    batch: int,
) -> Float[Tensor, " batch"]:
    r"""Compute each sample's mean forward KL over what `keep_top_k` kept of the reference.

    All other tokens count as one, so the value is never above the whole forward KL, and
    zero exactly where the kept parts agree.

    Args:
        logits: Predictions with the security tensor.
        log_probs: Log-probabilities of the undefended model, those of all others last.
        ids: The tokens that they belong to.
        rows: Which sample each token belongs to.
        batch: Number of samples.
    """
    own = _coarse(logits.float().log_softmax(-1), ids)
    losses = (log_probs.exp() * (log_probs - own)).sum(-1)
    return _mean_by_row(losses, rows, batch)


def keep_first_labels(
    labels: Int[Tensor, "batch seq"], count: int, *, ignored: int = -100
) -> Int[Tensor, "batch seq"]:
    """Ignore every label after the first `count` of each row.

    Args:
        labels: Labels, `ignored` where nothing is wanted; not changed.
        count: Labels to keep in each row; 0 keeps all.
        ignored: The value of positions without a label.
    """
    if count == 0:
        return labels
    return labels.masked_fill(labels.ne(ignored).cumsum(-1) > count, ignored)


def build_batches(
    lengths: Sequence[int],
    groups: Sequence[Hashable],
    strata: Sequence[Hashable],
    batch_size: int,
    seed: int,
) -> list[list[int]]:
    """Deal samples into batches of similar length with the same mixture of strata.

    Without strata, batches of similar length would be nearly all refusals or nearly none,
    because refusals are short, and the steps would pull one way and the other.

    Args:
        lengths: Length of each sample, in any unit.
        groups: Samples of different groups never share a batch.
        strata: What every batch of a group has in the same shares, e.g. the set names.
        batch_size: Samples in a batch; the last one of a group may have fewer.
        seed: Seed of the order and of who meets whom.

    Returns:
        Indices of samples, each exactly once.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(len(lengths), generator=generator).tolist()
    members: dict[Hashable, dict[Hashable, list[int]]] = {}
    for index in torch.randperm(len(lengths), generator=generator).tolist():
        members.setdefault(groups[index], {}).setdefault(strata[index], []).append(index)
    batches: list[list[int]] = []
    for group in members.values():
        places: list[tuple[float, int]] = []
        for stratum in group.values():
            stratum.sort(key=lambda index: lengths[index] * (1 + _JITTER * noise[index]))
            places += [((rank + 0.5) / len(stratum), i) for rank, i in enumerate(stratum)]
        order = [index for _, index in sorted(places)]
        batches += [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    shuffled = torch.randperm(len(batches), generator=generator).tolist()
    return [batches[index] for index in shuffled]


def _coarse(
    log_probs: Float[Tensor, "tokens vocab"], ids: Int[Tensor, "tokens top"]
) -> Float[Tensor, "tokens kept"]:
    """Return the log-probabilities of some tokens, and that of all others together."""
    others = log_probs.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    lowest = torch.finfo(log_probs.dtype).min
    return torch.cat([log_probs.gather(-1, ids), others.clamp(min=lowest)], dim=-1)


def _mean_by_row(
    losses: Float[Tensor, " tokens"], rows: Int[Tensor, " tokens"], batch: int
) -> Float[Tensor, " batch"]:
    sums = losses.new_zeros(batch).index_add(0, rows, losses)
    counts = losses.new_zeros(batch).index_add(0, rows, torch.ones_like(losses))
    return sums / counts.clamp(min=1)
