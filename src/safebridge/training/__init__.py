"""The training loop that all methods share."""

from importlib import import_module
from typing import Any

__all__ = ["LoopResult", "LoopSettings", "ParameterGroup", "StepLoss", "TrainingEvent", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("safebridge.training.loop"), name)
