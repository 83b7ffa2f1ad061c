"""Names of methods, suites and built-in models, mapped to lazy "module:object" strings."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from safebridge.errors import UnknownNameError

__all__ = ["BUILTIN_MODELS", "METHODS", "SUITES", "resolve"]

METHODS: dict[str, str] = {
    "activation-revision": "safebridge.methods.activation_revision.method:ActivationRevision",
    "security-tensors": "safebridge.methods.security_tensors.method:SecurityTensors",
    "text-guided-alignment": "safebridge.methods.text_guided_alignment.method:TextGuidedAlignment",
}

SUITES: dict[str, str] = {
    "twins": "safebridge.evaluation.suites:twins",
    "naming": "safebridge.evaluation.suites:naming",
}

BUILTIN_MODELS: dict[str, str] = {
    "safebridge/mini": "safebridge.models.mini:load_mini",
    "tiny": "safebridge.testing.tiny:tiny_vlm",
}
"""`tiny` answers to `tiny/<family>`; its loader takes the family's name."""


def resolve(kind: str, name: str, table: Mapping[str, str]) -> Any:
    """Return the object that a registered name stands for, importing it now.

    Args:
        kind: What the name is, for the error message.
        name: A key of `table`.
        table: Names to "module:object" strings.

    Raises:
        UnknownNameError: If `name` is not in `table`.
    """
    if name not in table:
        raise UnknownNameError(kind, name, table)
    module, _, attribute = table[name].partition(":")
    return getattr(import_module(module), attribute)
