"""Searches strength, sites and gate of a fitted revision under a budget of side effects."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, final

from safebridge.errors import SettingError
from safebridge.methods.activation_revision.method import ActivationRevision
from safebridge.optional import require

__all__ = ["STRATEGIES", "Budget", "Measured", "SearchResult", "Trial", "search"]

STRATEGIES: Final = ("grid", "bayesian")
"""`grid` tries every combination; `bayesian` lets Optuna's TPE sampler choose."""


@final
@dataclass(frozen=True)
class Measured:
    """What a setting does to held-out validation data."""

    attack_success_rate: float
    """Share of harmful requests that are not refused, in [0, 1]."""

    over_refusal_rate: float
    """Share of harmless requests that are refused, in [0, 1]."""

    utility: float
    """Share of right answers to ordinary questions, in [0, 1]."""


@final
@dataclass(frozen=True)
class Budget:
    """Largest side effects that a setting may have, against the undefended model."""

    over_refusal: float = 0.02
    """Rise of the over-refusal rate."""

    utility: float = 0.01
    """Fall of the utility."""

    def excess(self, base: Measured, found: Measured) -> tuple[float, float]:
        """Return by how much each limit is exceeded; at most 0 is within the budget.

        Args:
            base: The undefended model.
            found: The defended one.
        """
        # Rates are counts over n: a rounding error must not decide.
        slack = 1e-9
        return (
            found.over_refusal_rate - base.over_refusal_rate - self.over_refusal - slack,
            base.utility - found.utility - self.utility - slack,
        )


@final
@dataclass(frozen=True)
class Trial:
    """One setting and what came of it."""

    settings: Mapping[str, Any]
    """Changes for `ActivationRevision.select`."""

    measured: Measured
    """What it does."""

    is_within_budget: bool
    """Whether it keeps the budget."""


@final
@dataclass(frozen=True)
class SearchResult:
    """All trials, and the best of those within the budget."""

    trials: tuple[Trial, ...]
    """In the order in which they were tried."""

    best: Trial | None = field(default=None)
    """The lowest attack success rate within the budget, a tie going to the lower over-refusal,
    then to the higher utility, then to the earlier trial; None if no trial keeps the budget."""


def search(
    method: ActivationRevision,
    measure: Callable[[ActivationRevision], Measured],
    base: Measured,
    space: Mapping[str, Sequence[Any]],
    *,
    strategy: str = "grid",
    trials: int = 30,
    budget: Budget | None = None,
    seed: int = 0,
    progress: Callable[[Trial], object] | None = None,
) -> SearchResult:
    """Look for the setting with the fewest successful attacks that keeps the budget.

    Args:
        method: A fitted revision.
        measure: Applies a revision and measures it on validation data, never on test data.
        base: The undefended model on the same data.
        space: Values to try by setting, e.g. `{"top_k": [8, 16], "alpha": [5.0, 10.0]}`; any
            setting that `ActivationRevision.select` takes.
        strategy: One of `STRATEGIES`.
        trials: Number of trials of the Bayesian search.
        budget: The limits; None takes +2 points over-refusal and -1 point utility.
        seed: Seed of the Bayesian search.
        progress: Called after each trial.

    Returns:
        The result. The method stays as it was; `method.select(**result.best.settings)` is the
        chosen one.

    Raises:
        SettingError: If the space is empty or the strategy unknown.
        MissingExtraError: If the Bayesian search lacks Optuna.
    """
    if strategy not in STRATEGIES:
        raise SettingError(f"strategy={strategy!r} is unknown. Choose {' or '.join(STRATEGIES)}.")
    if not space or not all(len(values) for values in space.values()):
        raise SettingError("nothing to search. Name settings and the values to try.")
    limits = budget or Budget()
    found: list[Trial] = []
    known: dict[tuple[Any, ...], Trial] = {}

    def run(settings: Mapping[str, Any]) -> Trial:
        key = tuple(settings[name] for name in space)
        if key not in known:
            measured = measure(method.select(**settings))
            is_within = max(limits.excess(base, measured)) <= 0
            known[key] = Trial(dict(settings), measured, is_within)
            found.append(known[key])
            if progress is not None:
                progress(known[key])
        return known[key]

    if strategy == "grid":
        for values in itertools.product(*space.values()):
            run(dict(zip(space, values, strict=True)))
    else:
        _run_optuna(run, base, space, trials=trials, budget=limits, seed=seed)
    allowed = [trial for trial in found if trial.is_within_budget]
    return SearchResult(tuple(found), min(allowed, key=_merit, default=None))


def _merit(trial: Trial) -> tuple[float, float, float]:
    own = trial.measured
    return (own.attack_success_rate, own.over_refusal_rate, -own.utility)


def _run_optuna(
    run: Callable[[Mapping[str, Any]], Trial],
    base: Measured,
    space: Mapping[str, Sequence[Any]],
    *,
    trials: int,
    budget: Budget,
    seed: int,
) -> None:
    """Let Optuna propose settings; the budget is a constraint that it learns."""
    optuna = require("optuna", extra="search")

    def objective(trial: Any) -> float:
        # A choice is named by its place, because Optuna stores only simple values.
        places = {
            name: trial.suggest_int(name, 0, len(values) - 1) for name, values in space.items()
        }
        result = run({name: space[name][place] for name, place in places.items()})
        limits = zip(("over_refusal", "utility"), budget.excess(base, result.measured), strict=True)
        for name, excess in limits:
            trial.set_constraint(name, excess)
        return result.measured.attack_success_rate

    sampler = optuna.samplers.TPESampler(seed=seed)
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        optuna.create_study(sampler=sampler).optimize(objective, n_trials=trials)
    finally:
        optuna.logging.set_verbosity(verbosity)
