"""Directions that tell two classes of activations apart, for all sites at once."""

from typing import Final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from safebridge.errors import DataError

__all__ = [
    "VECTORS",
    "mass_mean_shift",
    "measure_sigma",
    "orient",
    "pca_direction",
    "random_directions",
    "to_unit",
]

VECTORS: Final = ("mms", "probe", "pca")
"""Mass mean shift, weight of a logistic probe, first principal component."""


def mass_mean_shift(
    features: Float[Tensor, "n sites width"], labels: Bool[Tensor, " n"]
) -> Float[Tensor, "sites width"]:
    r"""Return the difference of the class means.

    Computes $u = \overline{a}_{+} - \overline{a}_{-}$ for each site.

    Args:
        features: Activations.
        labels: True for the positive class.

    Raises:
        DataError: If a class is empty.

    Source:
        Li et al. 2023, "Inference-Time Intervention", section 3 (arXiv:2306.03341).
    """
    _check_classes(labels)
    return features[labels].mean(dim=0) - features[~labels].mean(dim=0)


def pca_direction(
    features: Float[Tensor, "n sites width"],
    labels: Bool[Tensor, " n"],
    groups: Int[Tensor, " n"],
) -> Float[Tensor, "sites width"]:
    """Return the first principal component of the activations, each group centred.

    A group's centre is the middle between its class means, so what the groups differ in is no
    part of it. The sign points to the positive class.

    Args:
        features: Activations.
        labels: True for the positive class.
        groups: Number of each row's contrastive group.

    Returns:
        Unit vectors.

    Raises:
        DataError: If a group lacks a class.

    Source:
        Zou et al. 2023, "Representation Engineering" (arXiv:2310.01405), and the pairwise form
        of Lee et al. 2024 (arXiv:2409.05907), carried over to groups of several samples.
    """
    centred = features.clone()
    for group in groups.unique():
        own = groups == group
        means = [features[own & side] for side in (labels, ~labels)]
        if not all(map(len, means)):
            raise DataError(
                f"group {int(group)} has samples of one class only. A contrastive group needs a "
                "safe and an unsafe sample."
            )
        centred[own] -= (means[0].mean(dim=0) + means[1].mean(dim=0)) / 2
    # [sites, n, width]; the smaller Gram matrix is decomposed
    rows = centred.transpose(0, 1).double()
    if rows.shape[1] >= rows.shape[2]:
        first = torch.linalg.eigh(rows.mT @ rows).eigenvectors[..., -1]
    else:
        weights = torch.linalg.eigh(rows @ rows.mT).eigenvectors[..., -1:]
        first = (rows.mT @ weights)[..., 0]
    return orient(to_unit(first.float()), features, labels)


def to_unit(directions: Float[Tensor, "*sites width"]) -> Float[Tensor, "*sites width"]:
    """Scale directions to length 1; zero stays zero.

    Args:
        directions: Any directions.
    """
    return torch.nn.functional.normalize(directions, dim=-1)


def orient(
    directions: Float[Tensor, "sites width"],
    features: Float[Tensor, "n sites width"],
    labels: Bool[Tensor, " n"],
) -> Float[Tensor, "sites width"]:
    """Flip the directions along which the positive class has the lower mean.

    Args:
        directions: One for each site.
        features: Activations.
        labels: True for the positive class.

    Raises:
        DataError: If a class is empty.
    """
    gap = (mass_mean_shift(features, labels) * directions).sum(dim=-1, keepdim=True)
    return torch.where(gap < 0, -directions, directions)


def measure_sigma(
    directions: Float[Tensor, "sites width"], reference: Float[Tensor, "n sites width"]
) -> Float[Tensor, " sites"]:
    """Return the standard deviation of activations along unit directions.

    Args:
        directions: Unit vectors.
        reference: Activations of the reference bank.

    Returns:
        The population standard deviation (divided by n, as numpy's default in ITI's code).
    """
    projected = torch.einsum("nsw,sw->ns", reference, directions)
    return projected.std(dim=0, correction=0)


def random_directions(shape: tuple[int, int], seed: int) -> Float[Tensor, "sites width"]:
    """Return unit vectors drawn evenly from the sphere.

    Args:
        shape: Number of sites and width.
        seed: Seed of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    return to_unit(torch.randn(shape, generator=generator))


def _check_classes(labels: Bool[Tensor, " n"]) -> None:
    if not bool(labels.any()) or bool(labels.all()):
        raise DataError(
            f"both classes need samples, found {int(labels.sum())} positive and "
            f"{int((~labels).sum())} negative."
        )
