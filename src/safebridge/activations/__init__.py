"""Activations: capture, probes, directions, and hooks that revise them."""

from importlib import import_module
from typing import Any

__all__ = [
    "ActivationStore",
    "Activations",
    "Edit",
    "Gate",
    "Probes",
    "TokenScope",
    "apply_edits",
    "capture_activations",
    "capture_to_disk",
    "fit_probes",
    "mass_mean_shift",
    "open_store",
]

_HOMES = {
    "ActivationStore": "safebridge.activations.store",
    "Activations": "safebridge.activations.capture",
    "Edit": "safebridge.activations.revision",
    "Gate": "safebridge.activations.gate",
    "Probes": "safebridge.activations.probes",
    "TokenScope": "safebridge.activations.scopes",
    "apply_edits": "safebridge.activations.revision",
    "capture_activations": "safebridge.activations.capture",
    "capture_to_disk": "safebridge.activations.store",
    "fit_probes": "safebridge.activations.probes",
    "mass_mean_shift": "safebridge.activations.directions",
    "open_store": "safebridge.activations.store",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
