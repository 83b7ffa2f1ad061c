"""Judges, statistics and suites that measure a model with and without a defense."""

from importlib import import_module
from typing import Any

_HOMES = {
    "Difference": "statistics",
    "Judgement": "judges",
    "Rate": "statistics",
    "SuiteResult": "runner",
    "find_judge": "judges",
    "load_judge_error": "calibration",
    "measure_difference": "statistics",
    "measure_rate": "statistics",
    "naming": "suites",
    "run_suite": "runner",
    "score_naming": "judges",
    "score_refusal": "judges",
    "show_progress": "runner",
    "twins": "suites",
}

__all__ = [
    "Difference",
    "Judgement",
    "Rate",
    "SuiteResult",
    "find_judge",
    "load_judge_error",
    "measure_difference",
    "measure_rate",
    "naming",
    "run_suite",
    "score_naming",
    "score_refusal",
    "show_progress",
    "twins",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"safebridge.evaluation.{_HOMES[name]}"), name)
