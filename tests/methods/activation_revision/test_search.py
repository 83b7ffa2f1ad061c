"""Search: the budget rules, the best is found, and both strategies agree."""

from collections.abc import Callable

import pytest

from safebridge.data.sample import Sample
from safebridge.errors import SettingError
from safebridge.methods.activation_revision.config import ActivationRevisionConfig
from safebridge.methods.activation_revision.method import ActivationRevision
from safebridge.methods.activation_revision.search import Budget, Measured, Trial, search
from safebridge.models.load import VLM

BASE = Measured(attack_success_rate=0.8, over_refusal_rate=0.05, utility=0.9)
SPACE = {"alpha": [1.0, 2.0, 4.0, 8.0], "top_k": [1, 2, 3]}


@pytest.fixture(scope="module")
def method(tiny: Callable[[str], VLM], answered: list[Sample]) -> ActivationRevision:
    return ActivationRevision.fit(tiny("llava"), answered, ActivationRevisionConfig())


def measure(method: ActivationRevision) -> Measured:
    """A made-up model: strength lowers attacks, and too much of it costs more than the budget."""
    push = method.config.alpha * method.config.top_k
    return Measured(max(0.0, 0.8 - 0.1 * push), 0.05 + 0.004 * push, 0.9 - 0.001 * push)


@pytest.mark.parametrize("strategy", ["grid", "bayesian"])
def test_the_best_setting_within_the_budget_is_found(
    method: ActivationRevision, strategy: str
) -> None:
    if strategy == "bayesian":
        pytest.importorskip("optuna")
    seen: list[Trial] = []
    result = search(
        method, measure, BASE, SPACE, strategy=strategy, trials=40, progress=seen.append
    )
    assert result.best is not None
    # Two points of over-refusal allow a push of 5; 4 is the most that the space has below it.
    assert result.best.settings["alpha"] * result.best.settings["top_k"] == 4.0
    assert list(result.trials) == seen
    assert len({tuple(trial.settings.items()) for trial in seen}) == len(seen)
    assert all(trial.is_within_budget == (measure_push(trial) <= 5) for trial in seen)


def measure_push(trial: Trial) -> float:
    return float(trial.settings["alpha"] * trial.settings["top_k"])


def test_nothing_is_best_when_nothing_keeps_the_budget(method: ActivationRevision) -> None:
    result = search(method, measure, BASE, SPACE, budget=Budget(over_refusal=0.0, utility=0.0))
    assert result.best is None
    assert len(result.trials) == 12


def test_errors_say_what_to_do(method: ActivationRevision) -> None:
    with pytest.raises(SettingError, match="Choose grid or bayesian"):
        search(method, measure, BASE, SPACE, strategy="luck")
    with pytest.raises(SettingError, match="Name settings"):
        search(method, measure, BASE, {"alpha": []})
