"""Guarded access to optional dependencies."""

from importlib import import_module
from types import ModuleType

from safebridge.errors import MissingExtraError

__all__ = ["require"]


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional dependency or say how to install it.

    Args:
        module: Dotted module name, e.g. "matplotlib".
        extra: The extra of Safebridge that brings it, e.g. "plots".

    Returns:
        The imported module.

    Raises:
        MissingExtraError: If it is not installed; the message names the extra.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".", maxsplit=1)[0]:
            raise
        raise MissingExtraError(
            f'{extra} need {module}. Install it with: pip install "safebridge[{extra}]"'
        ) from error
