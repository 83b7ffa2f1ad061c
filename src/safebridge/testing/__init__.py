"""What tests and quick trials need: tiny models that take the real code paths."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safebridge.testing.tiny import TINY_FAMILIES, tiny_vlm

__all__ = ["TINY_FAMILIES", "tiny_vlm"]


def __getattr__(name: str) -> Any:
    """Import a public name from the file that defines it, at its first use."""
    if name not in __all__:
        raise AttributeError(f"module 'safebridge.testing' has no attribute '{name}'")
    from safebridge.testing import tiny  # noqa: PLC0415 - importing it brings torch

    return getattr(tiny, name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
