"""Pictures of states: many dimensions laid flat, by PCA or t-SNE."""

import torch
from jaxtyping import Float
from torch import Tensor

from safebridge.errors import DataError, SettingError
from safebridge.optional import require

__all__ = ["PROJECTIONS", "project_states"]

PROJECTIONS = ("pca", "tsne")
"""Ways to lay states flat."""

_LEAST_ROWS = 4


def project_states(
    states: Float[Tensor, "n hidden"], *, kind: str = "pca", seed: int = 0
) -> Float[Tensor, "n 2"]:
    """Lay states flat, so that a person can look at them.

    PCA keeps distances as far as two axes can; its signs are fixed so that the entry of largest
    magnitude of each axis is positive. t-SNE keeps neighbours, and its distances between
    clouds mean nothing.

    Args:
        states: One row for each prompt.
        kind: One of `PROJECTIONS`.
        seed: Seed of t-SNE.

    Returns:
        Two coordinates for each prompt, in no unit.

    Raises:
        DataError: If there are fewer than four prompts.
        SettingError: If the kind is unknown.
        MissingExtraError: If t-SNE is asked for without scikit-learn.
    """
    if kind not in PROJECTIONS:
        raise SettingError(f"kind={kind!r} is unknown. Choose {' or '.join(PROJECTIONS)}.")
    if len(states) < _LEAST_ROWS:
        raise DataError(f"a picture of states needs {_LEAST_ROWS} prompts, found {len(states)}.")
    centred = states.double() - states.double().mean(dim=0)
    if kind == "tsne":
        manifold = require("sklearn.manifold", extra="reports")
        perplexity = min(30.0, (len(states) - 1) / 3)
        flat = manifold.TSNE(perplexity=perplexity, init="pca", random_state=seed)
        return torch.tensor(flat.fit_transform(centred.numpy()), dtype=torch.float32)
    left, lengths, axes = torch.linalg.svd(centred, full_matrices=False)
    largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))[:, 0]
    points = left * lengths * torch.where(largest < 0, -1.0, 1.0)
    if points.shape[1] < 2:  # noqa: PLR2004 - a plane has two axes
        points = torch.nn.functional.pad(points, (0, 1))
    flat_points: Tensor = points[:, :2].float()
    return flat_points
