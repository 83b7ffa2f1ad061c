"""Activation revision: vectors added to heads or layers that turn answers towards safe ones."""

from importlib import import_module
from typing import Any

__all__ = ["ActivationRevision", "ActivationRevisionConfig"]

_HOMES = {
    "ActivationRevision": "safebridge.methods.activation_revision.method",
    "ActivationRevisionConfig": "safebridge.methods.activation_revision.config",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
