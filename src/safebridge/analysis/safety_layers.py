"""Safety layers: where the decoder tells harmful requests from harmless ones, by angles."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from safebridge.analysis.curves import LayerCurve, bootstrap_curve
from safebridge.analysis.states import PromptStates, check_same_model
from safebridge.errors import DataError, ShapeError

__all__ = [
    "SafetyRange",
    "find_safety_range",
    "measure_activation_shift",
    "measure_angular_gap",
    "measure_pair_angles",
    "measure_shift_difference",
    "pairwise_angles",
]

_LEAST_RUN: Final = 2


@final
@dataclass(frozen=True)
class SafetyRange:
    """A band of decoder layers in which the gap opens."""

    first: int
    """The first layer, from 0."""

    last: int
    """The last layer, included."""

    peak: int
    """The layer with the widest gap."""


def pairwise_angles(
    left: Float[Tensor, "layers n hidden"], right: Float[Tensor, "other_layers m other_hidden"]
) -> Float[Tensor, "layers n m"]:
    r"""Return the angle between every pair of prompts in every layer.

    Computes $\arccos \langle a, b \rangle / (|a| |b|)$ in float64: near 0 degrees the
    arccosine loses half of the digits, and half-precision products overflow.

    Args:
        left: States of one group of prompts.
        right: States of the other group.

    Returns:
        Angles in degrees, in [0, 180].

    Raises:
        ShapeError: If the two come from models of different depth or width.
    """
    if left.shape[0] != right.shape[0] or left.shape[2] != right.shape[2]:
        raise ShapeError(
            f"states of shape {tuple(left.shape)} and {tuple(right.shape)} come from different "
            "models; record both with the same one."
        )
    a = torch.nn.functional.normalize(left.double(), dim=-1)
    b = torch.nn.functional.normalize(right.double(), dim=-1)
    cosines = torch.einsum("lnh,lmh->lnm", a, b).clamp(-1.0, 1.0)
    return torch.rad2deg(torch.arccos(cosines)).float()


def measure_angular_gap(
    normal: PromptStates,
    harmful: PromptStates,
    *,
    name: str,
    same_wording: bool = False,
    draws: int = 200,
    seed: int = 0,
) -> LayerCurve:
    r"""Measure how much further harmful prompts lie from normal ones than these from each other.

    Per layer, $\overline{\angle(n, m)} - \overline{\angle(n, n')}$ over all pairs with
    $n \neq n'$. Zero means that the layer does not tell the two apart.

    Args:
        normal: States of harmless prompts, at least two.
        harmful: States of harmful prompts, at least one.
        name: Name of the curve.
        same_wording: Take only pairs of one template. Twins differ far more in their wording
            than in their object, and that noise is in both angles.
        draws: Number of bootstrap draws over clusters of prompts.
        seed: Seed of these draws.

    Returns:
        The gap in degrees with a 95 % percentile band.

    Raises:
        ShapeError: If the states do not fit together or are too few.
        DataError: If there are no pairs to compare.

    Source:
        Li et al. 2025, "Safety Layers in Aligned Large Language Models", section 3
        (arXiv:2408.17003). They average over 500 random pairs of any wording; we take all
        pairs, and the bootstrap draws prompts, because the pairs are not independent.
    """
    across, inside = _pair_angles(normal, harmful, same_wording=same_wording)

    def measure(weights: list[Tensor]) -> Tensor:
        return across.mean(weights[0], weights[1]) - inside.mean(weights[0], weights[0])

    return bootstrap_curve(
        measure,
        [normal.clusters, harmful.clusters],
        name=name,
        layers=normal.layers,
        draws=draws,
        seed=seed,
    )


def measure_pair_angles(
    normal: PromptStates,
    harmful: PromptStates,
    *,
    same_wording: bool = False,
    draws: int = 200,
    seed: int = 0,
) -> tuple[LayerCurve, LayerCurve]:
    """Measure the two curves whose difference is the gap: N-N and N-M.

    Args:
        normal: As in `measure_angular_gap`.
        harmful: As in `measure_angular_gap`.
        same_wording: As in `measure_angular_gap`.
        draws: As in `measure_angular_gap`.
        seed: As in `measure_angular_gap`.

    Returns:
        Mean angles in degrees between two normal prompts, and between a normal and a harmful
        one.

    Raises:
        ShapeError: As `measure_angular_gap`.
        DataError: As `measure_angular_gap`.
    """
    across, inside = _pair_angles(normal, harmful, same_wording=same_wording)
    return (
        bootstrap_curve(
            lambda weights: inside.mean(weights[0], weights[0]),
            [normal.clusters],
            name="N-N",
            layers=normal.layers,
            draws=draws,
            seed=seed,
        ),
        bootstrap_curve(
            lambda weights: across.mean(weights[0], weights[1]),
            [normal.clusters, harmful.clusters],
            name="N-M",
            layers=normal.layers,
            draws=draws,
            seed=seed,
        ),
    )


def measure_activation_shift(
    plain: PromptStates, defended: PromptStates, *, name: str, draws: int = 200, seed: int = 0
) -> LayerCurve:
    """Measure how far a defense turns the state of each prompt: N-(N+d) or M-(M+d).

    Args:
        plain: States of the undefended model.
        defended: States of the defended model, for the same prompts in the same order.
        name: Name of the curve, e.g. "N-(N+d)".
        draws: Number of bootstrap draws over clusters of prompts.
        seed: Seed of these draws.

    Returns:
        The mean angle in degrees.

    Raises:
        ShapeError: If the two are not of the same prompts and model.

    Source:
        Li et al. 2025, "Security Tensors as a Cross-Modal Bridge", section 5.3
        (arXiv:2507.20994). Their script takes the arccosine of the mean cosine; we average the
        angles.
    """
    angles = _own_angles(plain, defended)
    return bootstrap_curve(
        lambda weights: _mean(weights[0], angles),
        [plain.clusters],
        name=name,
        layers=plain.layers,
        draws=draws,
        seed=seed,
    )


def measure_shift_difference(
    normal: tuple[PromptStates, PromptStates],
    harmful: tuple[PromptStates, PromptStates],
    *,
    name: str,
    draws: int = 200,
    seed: int = 0,
) -> LayerCurve:
    """Measure how much further a defense turns harmful prompts than normal ones.

    Args:
        normal: States of normal prompts, undefended and defended.
        harmful: States of harmful prompts, undefended and defended.
        name: Name of the curve.
        draws: Number of bootstrap draws over clusters of prompts.
        seed: Seed of these draws.

    Returns:
        M-(M+d) minus N-(N+d) in degrees; 0 where the defense treats both alike.

    Raises:
        ShapeError: If two states are not of the same prompts and model.
    """
    own, other = _own_angles(*normal), _own_angles(*harmful)
    check_same_model(normal[0], harmful[0])
    return bootstrap_curve(
        lambda weights: _mean(weights[1], other) - _mean(weights[0], own),
        [normal[0].clusters, harmful[0].clusters],
        name=name,
        layers=normal[0].layers,
        draws=draws,
        seed=seed,
    )


def find_safety_range(
    gap: LayerCurve, *, least_degrees: float = 1.0, growth_share: float = 0.25
) -> SafetyRange | None:
    """Find the layers in which the gap opens: from where it appears to its first smoothing.

    The paper reads this range off the curve by eye. Our rule: there are safety layers if two
    neighbouring layers lie above `least_degrees` with their whole interval. The steepest step
    up to the widest of them is searched, and the range grows from it to both sides through
    layers that lie above `least_degrees`, for as long as each step is at least `growth_share` of
    the steepest one.

    Args:
        gap: What `measure_angular_gap` returned.
        least_degrees: Gap below which nothing counts as safety layers.
        growth_share: Share of the steepest step at which growth has ended, in (0, 1).

    Returns:
        The range, in numbers of decoder layers, or None.
    """
    layers = gap.layers or tuple(range(len(gap.values)))
    is_open = [low > least_degrees for low in gap.low]
    runs = [i for i in range(len(layers) - _LEAST_RUN + 1) if all(is_open[i : i + _LEAST_RUN])]
    if not runs:
        return None
    peak = max((i for i, is_in in enumerate(is_open) if is_in), key=lambda i: gap.values[i])
    before = (0.0, *gap.values)
    steps = [after - was for after, was in zip(gap.values, before, strict=False)]
    steepest = max(range(peak + 1), key=lambda i: steps[i])
    enough = growth_share * steps[steepest]
    first = last = steepest
    while first > 0 and is_open[first - 1] and steps[first - 1] >= enough:
        first -= 1
    while last + 1 < len(steps) and is_open[last + 1] and steps[last + 1] >= enough:
        last += 1
    return SafetyRange(layers[first], layers[last], layers[peak])


@dataclass(frozen=True, eq=False)
class _Pairs:
    """Angles of pairs, and which of them count."""

    angles: Float[Tensor, "layers n m"]
    counts: Float[Tensor, "n m"]

    def mean(
        self, left: Float[Tensor, "draws n"], right: Float[Tensor, "draws m"]
    ) -> Float[Tensor, "draws layers"]:
        """Return the mean angle in each draw; not a number where a draw has no pair."""
        total = torch.einsum("dn,lnm,dm->dl", left, self.angles * self.counts, right)
        return total / torch.einsum("dn,nm,dm->d", left, self.counts, right)[:, None]


def _pair_angles(
    normal: PromptStates, harmful: PromptStates, *, same_wording: bool
) -> tuple[_Pairs, _Pairs]:
    """Return the pairs across the two groups and those inside the normal one."""
    if normal.n < 2 or harmful.n < 1:  # noqa: PLR2004 - a pair has two
        raise ShapeError(
            f"an angular gap needs two normal prompts and one harmful one, found "
            f"{normal.n} and {harmful.n}; raise layer_samples."
        )
    check_same_model(normal, harmful)
    own = ~torch.eye(normal.n, dtype=torch.bool)
    across = torch.ones(normal.n, harmful.n, dtype=torch.bool)
    if same_wording:
        own = own & _is_shared(normal.wordings, normal.wordings)
        across = across & _is_shared(normal.wordings, harmful.wordings)
    if not (bool(own.any()) and bool(across.any())):
        raise DataError(
            "no two prompts share a wording. Give twins that name their `template`, or compare "
            "prompts of any wording with same_wording=False."
        )
    return (
        _Pairs(pairwise_angles(normal.states, harmful.states), across.float()),
        _Pairs(pairwise_angles(normal.states, normal.states), own.float()),
    )


def _is_shared(left: Sequence[str], right: Sequence[str]) -> Bool[Tensor, "n m"]:
    return torch.tensor([[one == other for other in right] for one in left])


def _own_angles(plain: PromptStates, defended: PromptStates) -> Float[Tensor, "n layers"]:
    """Return the angle between the two states of each prompt."""
    check_same_model(plain, defended)
    if plain.clusters != defended.clusters:
        raise ShapeError(
            f"{plain.n} and {defended.n} prompts are not the same prompts in the same order; "
            "record both with the same samples."
        )
    cosines = torch.nn.functional.cosine_similarity(
        plain.states.double(), defended.states.double(), dim=-1
    ).clamp(-1.0, 1.0)
    return torch.rad2deg(torch.arccos(cosines)).float().T


def _mean(
    weights: Float[Tensor, "draws n"], rows: Float[Tensor, "n layers"]
) -> Float[Tensor, "draws layers"]:
    return weights @ rows / weights.sum(dim=1, keepdim=True)
