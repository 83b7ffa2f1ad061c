"""Security tensors: virtual tokens or a pixel tensor that carry text safety over to pictures."""

from importlib import import_module
from typing import Any

__all__ = ["SecurityTensors", "SecurityTensorsConfig"]

_HOMES = {
    "SecurityTensors": "safebridge.methods.security_tensors.method",
    "SecurityTensorsConfig": "safebridge.methods.security_tensors.config",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
