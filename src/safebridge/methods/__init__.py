"""Methods that close the gap; each is one folder."""

from importlib import import_module
from typing import Any

__all__ = [
    "ActivationRevision",
    "ActivationRevisionConfig",
    "Method",
    "SecurityTensors",
    "SecurityTensorsConfig",
    "TextGuidedAlignment",
    "TextGuidedAlignmentConfig",
]

_HOMES = {
    "ActivationRevision": "safebridge.methods.activation_revision.method",
    "ActivationRevisionConfig": "safebridge.methods.activation_revision.config",
    "Method": "safebridge.methods.protocol",
    "SecurityTensors": "safebridge.methods.security_tensors.method",
    "SecurityTensorsConfig": "safebridge.methods.security_tensors.config",
    "TextGuidedAlignment": "safebridge.methods.text_guided_alignment.method",
    "TextGuidedAlignmentConfig": "safebridge.methods.text_guided_alignment.config",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
