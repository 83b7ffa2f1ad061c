"""Fitted tensors on disk: one folder, strict on loading."""

from importlib import import_module
from typing import Any

__all__ = ["Artifact", "ArtifactMetadata", "load_artifact", "save_artifact"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("safebridge.artifacts.store"), name)
