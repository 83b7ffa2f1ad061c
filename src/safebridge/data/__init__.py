"""Samples, pictures and the builders of data sets."""

from importlib import import_module
from typing import Any

__all__ = ["Sample", "build_triad", "open_image", "open_images"]

_HOMES = {
    "Sample": "safebridge.data.sample",
    "build_triad": "safebridge.data.triad",
    "open_image": "safebridge.data.sample",
    "open_images": "safebridge.data.sample",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
