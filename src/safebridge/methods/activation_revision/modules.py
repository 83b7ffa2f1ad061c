"""What is fitted: for each head or layer a direction, its units, and how well it tells."""

from collections.abc import Mapping, Sequence
from typing import Final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from safebridge.activations.directions import (
    mass_mean_shift,
    measure_sigma,
    orient,
    pca_direction,
    random_directions,
    to_unit,
)
from safebridge.activations.probes import (
    Probes,
    fit_probes,
    measure_probes,
    rank_sites,
    split_groups,
)
from safebridge.methods.activation_revision.config import ActivationRevisionConfig

__all__ = ["SITE_TENSORS", "build_shifts", "choose_sites", "fit_sites"]

SITE_TENSORS: Final = (
    "directions",
    "sigma",
    "mean_difference",
    "activation_norm",
    "accuracy",
    "log_loss",
    "layers",
    "heads",
)
"""Tensors of a fit, one row for each site: unit directions towards safe, the units that a
strength can have, held-out accuracy and log loss of the probe, and where the site is (a head
of -1 is a whole layer)."""


def fit_sites(
    features: Float[Tensor, "n sites width"],
    labels: Bool[Tensor, " n"],
    groups: Sequence[str],
    config: ActivationRevisionConfig,
    reference: Float[Tensor, "m sites width"] | None = None,
) -> dict[str, Tensor]:
    """Fit probes and directions for all sites.

    As in ITI, the probe sees the training groups and is ranked on the held-out ones, and the
    class means are those of both.

    Args:
        features: Activations.
        labels: True for safe samples.
        groups: Name of each sample's contrastive group.
        config: The settings.
        reference: Activations whose spread is the unit sigma; None takes `features`.

    Returns:
        `SITE_TENSORS` without "layers" and "heads".
    """
    is_held_out = split_groups(groups, validation_ratio=config.validation_ratio, seed=config.seed)
    probes = fit_probes(
        features[~is_held_out],
        labels[~is_held_out],
        inverse_regularisation=config.inverse_regularisation,
    )
    accuracy, log_loss = measure_probes(probes, features[is_held_out], labels[is_held_out])
    shift = mass_mean_shift(features, labels)
    directions = _find_directions(features, labels, groups, config.vector, shift, probes)
    directions = orient(to_unit(directions), features, labels)
    return {
        "directions": directions,
        "sigma": measure_sigma(directions, features if reference is None else reference),
        "mean_difference": shift.norm(dim=-1),
        "activation_norm": features.norm(dim=-1).mean(dim=0),
        "accuracy": accuracy,
        "log_loss": log_loss,
    }


def choose_sites(
    tensors: Mapping[str, Tensor], config: ActivationRevisionConfig, num_layers: int
) -> Int[Tensor, " chosen"]:
    """Return the numbers of the sites that are revised, best first.

    Args:
        tensors: What was fitted.
        config: The settings.
        num_layers: Decoder layers of the model.
    """
    layers = config.parse_layers(num_layers)
    order = rank_sites(tensors["accuracy"], tensors["log_loss"])
    if layers is not None:
        order = order[torch.isin(tensors["layers"][order], torch.tensor(layers))]
    if config.selection == "random":
        generator = torch.Generator().manual_seed(config.seed)
        order = order.sort().values  # so that the draw does not depend on the ranking
        order = order[torch.randperm(len(order), generator=generator)]
    return order[: config.count_sites(len(order))]


def build_shifts(
    tensors: Mapping[str, Tensor],
    config: ActivationRevisionConfig,
    num_layers: int,
    num_heads: int,
) -> dict[int, Float[Tensor, " width"]]:
    r"""Return what is added to each revised layer at strength 1.

    A site gets $\alpha \cdot unit \cdot \theta$; the heads of a layer stand side by side, with
    zeros for those that are not revised.

    Args:
        tensors: What was fitted.
        config: The settings.
        num_layers: Decoder layers of the model.
        num_heads: Query heads of one layer.
    """
    directions = tensors["directions"]
    if config.direction == "random":
        directions = random_directions((directions.shape[0], directions.shape[1]), config.seed)
    sign = -1.0 if config.direction == "opposite" else 1.0
    unit = torch.ones(len(directions)) if config.unit == "one" else tensors[config.unit].float()
    shifts = sign * config.factor * unit[:, None] * directions
    found: dict[int, Tensor] = {}
    for site in choose_sites(tensors, config, num_layers).tolist():
        layer, head = int(tensors["layers"][site]), int(tensors["heads"][site])
        if head < 0:
            found[layer] = shifts[site]
            continue
        heads = found.setdefault(layer, shifts.new_zeros(num_heads * shifts.shape[1]))
        heads.view(num_heads, -1)[head] = shifts[site]
    return dict(sorted(found.items()))


def _find_directions(  # noqa: PLR0917 - what a direction may be made of
    features: Tensor,
    labels: Tensor,
    groups: Sequence[str],
    vector: str,
    shift: Tensor,
    probes: Probes,
) -> Tensor:
    if vector == "mms":
        return shift
    if vector == "probe":
        return probes.weight.float()
    numbers = {name: number for number, name in enumerate(dict.fromkeys(groups))}
    return pca_direction(features, labels, torch.tensor([numbers[name] for name in groups]))
