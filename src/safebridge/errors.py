"""The errors that Safebridge raises on purpose; each says what was expected, found and to do."""

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = [
    "ArtifactError",
    "DataError",
    "LayoutError",
    "MissingExtraError",
    "ModelLoadError",
    "ModelMismatchError",
    "SafebridgeError",
    "SettingError",
    "ShapeError",
    "UnknownNameError",
]


class SafebridgeError(Exception):
    """Base of every error that Safebridge raises on purpose."""


class LayoutError(SafebridgeError, LookupError):
    """A part of a model was not found where its family keeps it."""


class ShapeError(SafebridgeError, ValueError):
    """A tensor does not fit the model or the tensor it meets."""


class DataError(SafebridgeError, ValueError):
    """A sample, picture or data file cannot be used as given."""


class SettingError(SafebridgeError, ValueError):
    """A setting has a value that it cannot take, or does not go with another one."""


class ArtifactError(SafebridgeError, ValueError):
    """A saved artifact is missing, damaged or of another kind."""


class ModelMismatchError(SafebridgeError, ValueError):
    """An artifact was fitted on another model than the one in hand."""


class ModelLoadError(SafebridgeError, OSError):
    """A model or one of its parts could not be loaded."""


class MissingExtraError(SafebridgeError, ImportError):
    """An optional dependency is not installed."""


class UnknownNameError(SafebridgeError, KeyError):
    """A name is not registered; the message suggests the nearest one.

    Args:
        kind: What was looked for, e.g. "method".
        name: The name as given.
        known: The names that exist.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        close = get_close_matches(name, names, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        super().__init__(f"no {kind} '{name}'.{hint} Known: {', '.join(names)}")

    def __str__(self) -> str:
        """Return the message itself; KeyError would print its repr."""
        return str(self.args[0])
