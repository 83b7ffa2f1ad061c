"""Logistic probes for many sites, fitted together as one batched problem."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from safebridge.errors import DataError, SettingError

__all__ = ["Probes", "fit_probes", "measure_probes", "rank_sites", "split_groups"]

_CHUNK_BYTES: Final = 2 * 2**20
_MAX_CONJUGATE_STEPS: Final = 60
_WARM_STEPS: Final = 3
_REFRESH_STEPS: Final = 8
_ROWS_PER_COLUMN: Final = 3
_LINE_STEPS: Final = 2
_SINGLE_PRECISION_LIMIT: Final = 1e-5
_MAX_NEWTON_STEPS: Final = 200
_HALVINGS: Final = 30


@final
@dataclass(frozen=True, eq=False)
class Probes:
    """One logistic probe for each site, p(positive) = sigmoid(weight . x + bias)."""

    weight: Float[Tensor, "sites width"]
    """Weights, float64."""

    bias: Float[Tensor, " sites"]
    """Intercepts, float64."""

    def logits(self, features: Float[Tensor, "n sites width"]) -> Float[Tensor, "n sites"]:
        """Return the log-odds of the positive class.

        Args:
            features: Activations.
        """
        return torch.einsum("nsw,sw->ns", features.double(), self.weight) + self.bias


def fit_probes(
    features: Float[Tensor, "n sites width"],
    labels: Bool[Tensor, " n"],
    *,
    inverse_regularisation: float = 1.0,
    tolerance: float = 1e-4,
) -> Probes:
    r"""Fit one L2-regularised logistic regression for each site, all together.

    Minimises $\tfrac12 |w|^2 + C \sum_i \log(1 + e^{-y_i (w x_i + b)})$, the intercept not
    regularised, as scikit-learn's LogisticRegression with its defaults does and ITI uses.
    Preconditioned conjugate gradients, and Newton steps where these do not get there. Where
    samples are fewer than features the problem is first turned into one of the samples' span,
    which has the same solution.

    Args:
        features: Activations, on any device.
        labels: True for the positive class.
        inverse_regularisation: The factor $C$; larger regularises less.
        tolerance: Largest component of the gradient, divided by $C n$, at which a fit is done, as
            scikit-learn has it. Below 1e-5 everything is computed in double precision.

    Returns:
        The probes, on the device of `features`.

    Raises:
        DataError: If a class is empty.
        SettingError: If a number is not positive, or a fit does not converge.
    """
    if not (inverse_regularisation > 0 and tolerance > 0):
        raise SettingError("inverse_regularisation and tolerance must be above 0.")
    if not bool(labels.any()) or bool(labels.all()):
        raise DataError("a probe needs samples of both classes. Give safe and unsafe ones.")
    n, sites, width = features.shape
    is_wide = n < width
    is_single = tolerance >= _SINGLE_PRECISION_LIMIT and not is_wide
    dtype = torch.float32 if is_single else torch.float64
    columns = min(n, width) + 1
    size = min(sites, max(1, _CHUNK_BYTES // (dtype.itemsize * n * columns)))
    weight = features.new_empty(sites, width, dtype=torch.float64)
    bias = features.new_empty(sites, dtype=torch.float64)
    targets = labels.to(dtype)
    # Filled again for each chunk: fresh memory would cost more time than the steps.
    designs = features.new_ones(size, n, columns, dtype=dtype)
    turned = features.new_empty(size, columns, n, dtype=dtype)
    for start in range(0, sites, size):
        part = slice(start, start + size)
        rows = features[:, part].transpose(0, 1)
        inner = _span(rows.to(dtype)) if is_wide else rows
        design = designs[: len(rows)]
        design[..., :-1] = inner
        found = _fit(design, turned[: len(rows)], targets, inverse_regularisation, tolerance)
        own = found[:, :-1]
        if is_wide:
            own = torch.linalg.solve_triangular(inner.mT, own[..., None], upper=True)
            own = (rows.to(dtype).mT @ own)[..., 0]
        weight[part], bias[part] = own, found[:, -1]
    return Probes(weight, bias)


def _span(rows: Float[Tensor, "sites n width"]) -> Float[Tensor, "sites n n"]:
    """Return features of as many columns as samples with the same inner products."""
    gram = rows @ rows.mT
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    # Samples that depend on each other make it singular; this much changes no margin.
    diagonal += 1e-11 * diagonal.mean(dim=-1, keepdim=True)
    factors: Tensor = torch.linalg.cholesky(gram)
    return factors


def _fit(
    design: Float[Tensor, "sites n columns"],
    turned: Float[Tensor, "sites columns n"],
    targets: Float[Tensor, " n"],
    factor: float,
    tolerance: float,
) -> Float[Tensor, "sites columns"]:
    """Return the weights of each site, the last one that of the column of ones."""
    limit = tolerance * factor * design.shape[1]
    ridge = design.new_ones(design.shape[2])
    ridge[-1] = 0.0
    descent = _Descent(design, turned, targets, ridge, factor)
    is_done = descent.run(limit)
    found = descent.theta.double()
    if not bool(is_done.all()):
        rest = ~is_done
        found[rest] = _newton(
            design[rest].double(), targets.double(), ridge.double(), factor, limit
        )
    return found


class _Descent:
    """Preconditioned conjugate gradients on many sites.

    The first steps are scaled by the Hessian's diagonal. They bring most margins to where they
    end, and there the whole Hessian is factorised once, which makes the rest a few steps.
    """

    def __init__(
        self, design: Tensor, turned: Tensor, targets: Tensor, ridge: Tensor, factor: float
    ) -> None:
        self.design, self.targets, self.ridge, self.factor = design, targets, ridge, factor
        # A row times a matrix is several times faster than a matrix times a column.
        self.turned = turned.copy_(design.mT)
        self.theta = design.new_zeros(design.shape[0], design.shape[2])
        self.margins = design.new_zeros(design.shape[:2])
        self.p = torch.sigmoid(self.margins)
        self.gradient = factor * _rows_times(self.p - targets, design)
        squares = torch.linalg.vector_norm(turned, dim=2).square()
        self.diagonal = (factor / 4) * squares + ridge
        self.factors: Tensor | None = None
        self.way: Tensor | None = None
        self.old = self.gradient
        self.slope = self.theta[:, :1]

    def run(self, limit: float) -> Tensor:
        """Descend until no gradient is above the limit; return which sites got there."""
        for step in range(_MAX_CONJUGATE_STEPS):
            is_near = self.gradient.abs().amax(dim=-1) <= limit
            if bool(is_near.all()):
                break
            if step % _REFRESH_STEPS == _WARM_STEPS:
                self.factorise()
            self.step(is_near)
        return self.gradient.abs().amax(dim=-1) <= limit

    def factorise(self) -> None:
        """Take the Hessian where the sites are as the new preconditioner, and start over."""
        self.way = None
        n, columns = self.design.shape[1:]
        # It only steers the steps, so a share of the samples does where there are many.
        stride = max(1, n // (_ROWS_PER_COLUMN * columns))
        curvature = stride * self.factor * (self.p * (1 - self.p))[:, ::stride]
        half = self.design[:, ::stride] * curvature.sqrt()[..., None]
        hessian = half.mT @ half
        # The intercept has no ridge; a hair of one keeps a saturated fit solvable.
        hessian.diagonal(dim1=-2, dim2=-1).add_(self.ridge + 1e-6)
        factors, info = torch.linalg.cholesky_ex(hessian)
        self.factors = factors if bool((info == 0).all()) else None

    def step(self, is_still: Tensor) -> None:
        """Go one step, except at sites that stand still."""
        gradient = self.gradient
        if self.factors is None:
            scaled = gradient / self.diagonal
        else:
            scaled = torch.cholesky_solve(gradient[..., None], self.factors)[..., 0]
        way = -scaled
        if self.way is not None:
            # Polak and Ribiere's factor; below zero it starts over.
            turn = (scaled * (gradient - self.old)).sum(-1, keepdim=True) / self.slope
            way = way + torch.where(turn > 0, turn, 0.0) * self.way
            is_up = (way * gradient).sum(-1, keepdim=True) >= 0
            way = torch.where(is_up | ~way.isfinite(), -scaled, way)
        self.way, self.old = way, gradient
        self.slope = (scaled * gradient).sum(-1, keepdim=True)
        moved = _rows_times(way, self.turned)
        penalty = [(self.ridge * way * o).sum(-1, keepdim=True) for o in (self.theta, way)]
        t = _search_line(self.margins, moved, self.targets, self.factor, *penalty)
        t = torch.where(is_still[:, None], 0.0, t)
        self.theta, self.margins = self.theta + t * way, self.margins + t * moved
        self.p = torch.sigmoid(self.margins)
        slope = self.factor * _rows_times(self.p - self.targets, self.design)
        self.gradient = slope + self.ridge * self.theta


def _search_line(  # noqa: PLR0917 - one line of the loss
    margins: Tensor, moved: Tensor, targets: Tensor, factor: float, linear: Tensor, square: Tensor
) -> Tensor:
    """Return how far to go: where the loss along the line is flat, by Newton's steps."""
    t = torch.zeros_like(linear)
    curve_bound = (factor / 4) * (moved * moved).sum(-1, keepdim=True) + square
    for step in range(_LINE_STEPS):
        p = torch.sigmoid(margins + t * moved)
        slope = factor * ((p - targets) * moved).sum(-1, keepdim=True) + linear + t * square
        if step == 0:
            first = slope
        curve = factor * (p * (1 - p) * moved * moved).sum(-1, keepdim=True) + square
        t = t - slope / torch.maximum(curve, 1e-3 * curve_bound)
    p = torch.sigmoid(margins + t * moved)
    last = factor * ((p - targets) * moved).sum(-1, keepdim=True) + linear + t * square
    # The step of the curvature's upper bound always lowers the loss.
    is_good = (t > 0) & (last.abs() <= first.abs())
    return torch.where(is_good, t, -first / curve_bound)


def _rows_times(rows: Tensor, matrices: Tensor) -> Tensor:
    """Multiply one row with one matrix for each site."""
    return (rows[:, None] @ matrices)[:, 0]


def _newton(
    design: Tensor, targets: Tensor, ridge: Tensor, factor: float, limit: float
) -> Float[Tensor, "sites columns"]:
    """Return weights by damped Newton steps, for problems that are badly conditioned."""
    theta = design.new_zeros(design.shape[0], design.shape[2])
    margins = design.new_zeros(design.shape[:2])
    for _ in range(_MAX_NEWTON_STEPS):
        p = torch.sigmoid(margins)
        gradient = factor * _rows_times(p - targets, design) + ridge * theta
        if float(gradient.abs().amax()) <= limit:
            return theta
        step = _solve(design, factor * p * (1 - p), ridge, gradient)
        moved = (design @ step[..., None])[..., 0]
        t = _damp(margins, moved, targets, factor, theta, step, ridge, gradient)
        theta, margins = theta + t * step, margins + t * moved
    raise SettingError(
        "a probe did not converge. Lower inverse_regularisation, or look for features that are "
        "not finite."
    )


def _solve(design: Tensor, curvature: Tensor, ridge: Tensor, gradient: Tensor) -> Tensor:
    """Return the Newton step of each site."""
    hessian = (design * curvature[..., None]).mT @ design
    # The intercept has no ridge; a hair of one keeps a saturated fit solvable.
    hessian.diagonal(dim1=-2, dim2=-1).add_(ridge + 1e-9)
    step: Tensor = torch.linalg.solve(hessian, -gradient)
    return step


def _damp(  # noqa: PLR0917 - the state of one step
    margins: Tensor,
    moved: Tensor,
    targets: Tensor,
    factor: float,
    theta: Tensor,
    step: Tensor,
    ridge: Tensor,
    gradient: Tensor,
) -> Tensor:
    """Halve each site's step until its loss falls enough; the margins make this cheap."""
    slope = (gradient * step).sum(dim=-1, keepdim=True)
    before = _loss(margins, targets, factor, theta, ridge)
    t = torch.ones_like(before)
    for _ in range(_HALVINGS):
        after = _loss(margins + t * moved, targets, factor, theta + t * step, ridge)
        # Near the minimum the losses agree up to rounding, and the full step is right.
        is_good = after <= before + 1e-4 * t * slope + 1e-12 * before.abs()
        if bool(is_good.all()):
            break
        t = torch.where(is_good, t, t / 2)
    return t


def _loss(margins: Tensor, targets: Tensor, factor: float, theta: Tensor, ridge: Tensor) -> Tensor:
    fit = torch.nn.functional.softplus(margins) - targets * margins
    return factor * fit.sum(dim=-1, keepdim=True) + 0.5 * (ridge * theta**2).sum(-1, keepdim=True)


def measure_probes(
    probes: Probes, features: Float[Tensor, "n sites width"], labels: Bool[Tensor, " n"]
) -> tuple[Float[Tensor, " sites"], Float[Tensor, " sites"]]:
    """Return accuracy and mean log loss of each probe on samples that it was not fitted on.

    Args:
        probes: The probes.
        features: Activations of held-out samples.
        labels: True for the positive class.

    Returns:
        Accuracy in [0, 1] and log loss in nats, float64.
    """
    logits = probes.logits(features)
    accuracy = ((logits > 0) == labels[:, None]).double().mean(dim=0)
    targets = labels.double()[:, None].expand_as(logits)
    losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return accuracy, losses.mean(dim=0)


def rank_sites(
    accuracy: Float[Tensor, " sites"], log_loss: Float[Tensor, " sites"]
) -> Int[Tensor, " sites"]:
    """Rank sites by accuracy; a tie goes to the lower log loss, then to the lower number.

    Args:
        accuracy: Held-out accuracy.
        log_loss: Held-out log loss.

    Returns:
        Numbers of the sites, best first; always the same for the same numbers.
    """
    pairs = list(zip(accuracy.tolist(), log_loss.tolist(), strict=True))
    order = sorted(range(len(pairs)), key=lambda i: (-pairs[i][0], pairs[i][1], i))
    return torch.tensor(order)


def split_groups(
    groups: Sequence[str], *, validation_ratio: float, seed: int
) -> Bool[Tensor, " n"]:
    """Say which samples are held out, whole groups at a time.

    Args:
        groups: The group of each sample.
        validation_ratio: Share of the groups that are held out, in (0, 1); at least one is, and
            at least one is not.
        seed: Seed of the choice.

    Returns:
        True for held-out samples.

    Raises:
        DataError: If there are fewer than two groups.
        SettingError: If the ratio is out of range.
    """
    names = sorted(set(groups))
    if len(names) < 2:  # noqa: PLR2004 - one to fit on, one to hold out
        raise DataError(f"a split needs two groups or more, found {len(names)}.")
    if not 0 < validation_ratio < 1:
        raise SettingError(f"validation_ratio={validation_ratio} must be between 0 and 1.")
    count = min(max(1, round(validation_ratio * len(names))), len(names) - 1)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = {names[i] for i in order[:count]}
    return torch.tensor([group in held_out for group in groups])
