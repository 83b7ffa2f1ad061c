"""Safebridge: diagnose and close the gap between text safety and image safety of large VLMs."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safebridge.data.sample import Sample
    from safebridge.errors import SafebridgeError
    from safebridge.methods.security_tensors.config import SecurityTensorsConfig
    from safebridge.methods.security_tensors.method import SecurityTensors
    from safebridge.models.generate import generate_answers
    from safebridge.models.layout import VLMLayout
    from safebridge.models.load import VLM, load_vlm

__version__ = "0.1.0"

__all__ = [
    "VLM",
    "SafebridgeError",
    "Sample",
    "SecurityTensors",
    "SecurityTensorsConfig",
    "VLMLayout",
    "__version__",
    "generate_answers",
    "load_vlm",
]

_HOMES = {
    "VLM": "safebridge.models.load",
    "Sample": "safebridge.data.sample",
    "SafebridgeError": "safebridge.errors",
    "SecurityTensors": "safebridge.methods.security_tensors.method",
    "SecurityTensorsConfig": "safebridge.methods.security_tensors.config",
    "VLMLayout": "safebridge.models.layout",
    "generate_answers": "safebridge.models.generate",
    "load_vlm": "safebridge.models.load",
}


def __getattr__(name: str) -> Any:
    """Import a public name from the file that defines it, at its first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'safebridge' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
