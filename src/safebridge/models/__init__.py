"""Vision-language models: load one, know its parts, encode for it, hook into it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safebridge.models.families import FAMILIES, find_layout
    from safebridge.models.generate import generate_answers
    from safebridge.models.hooks import (
        capture_input,
        capture_output,
        replace_input,
        replace_output,
    )
    from safebridge.models.layout import VLMLayout
    from safebridge.models.load import VLM, load_vlm, measure_fingerprint
    from safebridge.models.tokens import Encoded, TokenSpans, encode

__all__ = [
    "FAMILIES",
    "VLM",
    "Encoded",
    "TokenSpans",
    "VLMLayout",
    "capture_input",
    "capture_output",
    "encode",
    "find_layout",
    "generate_answers",
    "load_vlm",
    "measure_fingerprint",
    "replace_input",
    "replace_output",
]

_HOMES = {
    "FAMILIES": "families",
    "VLM": "load",
    "Encoded": "tokens",
    "TokenSpans": "tokens",
    "VLMLayout": "layout",
    "capture_input": "hooks",
    "capture_output": "hooks",
    "encode": "tokens",
    "find_layout": "families",
    "generate_answers": "generate",
    "load_vlm": "load",
    "measure_fingerprint": "load",
    "replace_input": "hooks",
    "replace_output": "hooks",
}


def __getattr__(name: str) -> Any:
    """Import a public name from the file that defines it, at its first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'safebridge.models' has no attribute '{name}'")
    return getattr(import_module(f"safebridge.models.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
