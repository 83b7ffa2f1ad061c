"""Text-guided alignment: pictures' hidden states are drawn to those of their captions."""

from importlib import import_module
from typing import Any

__all__ = ["TextGuidedAlignment", "TextGuidedAlignmentConfig"]

_HOMES = {
    "TextGuidedAlignment": "safebridge.methods.text_guided_alignment.method",
    "TextGuidedAlignmentConfig": "safebridge.methods.text_guided_alignment.config",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
