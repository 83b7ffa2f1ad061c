"""Fitted defenses by folder: which method each belongs to, and what the report calls it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from safebridge.errors import ArtifactError
from safebridge.methods.protocol import Method
from safebridge.models.load import VLM
from safebridge.registry import METHODS, resolve

__all__ = ["Defense", "load_defenses"]


@final
@dataclass(frozen=True)
class Defense:
    """A defense that was loaded for the model in hand."""

    name: str
    """What the report calls it; different for each."""

    kind: str
    """The method, e.g. "security-tensors"."""

    folder: Path
    """Where it was loaded from."""

    method: Method
    """The method, ready to be applied."""


def load_defenses(
    vlm: VLM, folders: Sequence[Path], *, allow_other_model: bool = False
) -> list[Defense]:
    """Load fitted artifacts; each folder says which method it belongs to.

    Args:
        vlm: The model they are for.
        folders: Artifact folders.
        allow_other_model: Accept artifacts of another model on purpose.

    Raises:
        ArtifactError: If a folder holds no artifact.
        UnknownNameError: If its method is not known.
        ModelMismatchError: If it was fitted on another model.
    """
    defenses: list[Defense] = []
    for folder in folders:
        kind = _read_kind(folder)
        method = resolve("method", kind, METHODS).load(
            folder, vlm, allow_other_model=allow_other_model
        )
        taken = {defense.name for defense in defenses}
        name, number = kind, 2
        while name in taken:
            name, number = f"{kind} {number}", number + 1
        defenses.append(Defense(name, kind, folder, method))
    return defenses


def _read_kind(folder: Path) -> str:
    path = folder / "artifact.json"
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["kind"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{folder} is no fitted defense: {path.name} cannot be read there. Give a folder that "
            "a method's save wrote, e.g. demo-results/artifact."
        ) from error
