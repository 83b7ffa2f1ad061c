"""Artifact folders: `artifact.json` and `tensors.safetensors`, written whole or not at all."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata as package_metadata
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from safebridge.errors import ArtifactError, ModelMismatchError

__all__ = ["Artifact", "ArtifactMetadata", "check_model", "load_artifact", "save_artifact"]

FORMAT_VERSION = 1
JSON_NAME = "artifact.json"
TENSORS_NAME = "tensors.safetensors"

_KEYS = {
    "format_version",
    "kind",
    "package_version",
    "config",
    "metadata",
    "tensors",
    "tensors_sha256",
}


@dataclass(frozen=True)
class ArtifactMetadata:
    """Where an artifact comes from."""

    base_model: str
    """Name or path of the model it was fitted on."""

    revision: str | None
    """Revision of that model, if it has one."""

    fingerprint: str
    """Fingerprint of that model's weights."""

    data_source: str
    """What it was fitted on: a name, a path or a digest of the samples."""

    seed: int
    """Seed of the fit."""

    details: dict[str, Any] = field(default_factory=dict)
    """Anything else worth keeping, as JSON."""


@dataclass(frozen=True)
class Artifact:
    """An artifact as read from disk, already checked."""

    kind: str
    """What it is, e.g. "security-tensors"."""

    config: dict[str, Any]
    """The settings of the fit."""

    tensors: dict[str, torch.Tensor]
    """The fitted tensors by name, on the CPU."""

    metadata: ArtifactMetadata
    """Where it comes from."""

    package_version: str
    """The version of Safebridge that wrote it."""


def save_artifact(
    folder: Path | str,
    *,
    kind: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    metadata: ArtifactMetadata,
) -> Path:
    """Write an artifact folder whole, or leave what was there as it was.

    The files are written to a hidden folder beside the target, flushed, and
    moved into place, so that a full disk or a stop half-way leaves an earlier
    artifact untouched.

    Args:
        folder: The folder to write. An earlier artifact in it is replaced;
            a folder with anything else in it is refused.
        kind: What the artifact is, e.g. "security-tensors".
        config: The settings of the fit, as JSON values.
        tensors: The fitted tensors by name.
        metadata: Where they come from.

    Returns:
        The folder.

    Raises:
        ArtifactError: If the folder holds other files or cannot be written.
    """
    folder = Path(folder)
    _check_target(folder)
    blob = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    record = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "package_version": _package_version(),
        "config": dict(config),
        "metadata": asdict(metadata),
        "tensors": {name: _describe(tensor) for name, tensor in tensors.items()},
        "tensors_sha256": hashlib.sha256(blob).hexdigest(),
    }
    text = json.dumps(record, indent=2, sort_keys=True, allow_nan=False) + "\n"
    try:
        _write_folder(folder, {TENSORS_NAME: blob, JSON_NAME: text.encode()})
    except OSError as error:
        raise ArtifactError(
            f"cannot write artifact {folder}: {error.strerror or error}. An earlier artifact there "
            "is unchanged; free some space or choose a folder you may write to."
        ) from error
    return folder


def check_model(
    folder: Path | str, fitted: ArtifactMetadata, *, name: str, fingerprint: str
) -> None:
    """Check that an artifact was fitted on a model.

    Args:
        folder: The artifact, for the error.
        fitted: What it says of itself.
        name: The model's name, for the error.
        fingerprint: The model's fingerprint.

    Raises:
        ModelMismatchError: If it was fitted on another one.
    """
    if fitted.fingerprint != fingerprint:
        raise ModelMismatchError(
            f"{folder} was fitted on {fitted.base_model} (fingerprint "
            f"{fitted.fingerprint[:8]}), but this is {name} (fingerprint "
            f"{fingerprint[:8]}). Load that model, fit again, or transfer it on purpose "
            "with allow_other_model=True."
        )


def load_artifact(folder: Path | str, *, kind: str) -> Artifact:
    """Read an artifact folder and check everything in it.

    Args:
        folder: A folder written by `save_artifact`.
        kind: The kind that is expected.

    Raises:
        ArtifactError: If a file or key is missing, a key is unknown, the format
            is newer, the kind is another, or the tensors were altered.
    """
    folder = Path(folder)
    record = _read_record(folder / JSON_NAME)
    _check_record(record, folder, kind)
    metadata = _read_metadata(record["metadata"], folder)
    return Artifact(
        kind=kind,
        config=dict(record["config"]),
        tensors=_read_tensors(record, folder),
        metadata=metadata,
        package_version=str(record["package_version"]),
    )


def _package_version() -> str:
    try:
        return package_metadata.version("safebridge")
    except package_metadata.PackageNotFoundError:
        return "unknown"  # run from a source tree that was never installed


def _describe(tensor: torch.Tensor) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}


def _check_target(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ArtifactError(f"{folder} is a file; an artifact needs a folder of its own.")
    if not folder.is_dir():
        return
    try:
        others = sorted({path.name for path in folder.iterdir()} - {JSON_NAME, TENSORS_NAME})
    except OSError as error:
        raise ArtifactError(f"cannot read folder {folder}: {error.strerror}.") from error
    if others:
        raise ArtifactError(
            f"folder {folder} holds other files ({', '.join(others[:3])}). "
            "Choose a folder of its own for the artifact."
        )


def _write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        work.chmod(0o755)  # mkdtemp makes it private; an artifact is shared like any folder
        for name, content in files.items():
            with (work / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        _swap(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _swap(new: Path, target: Path) -> None:
    if not target.exists():
        new.replace(target)
        return
    # A filled folder cannot be replaced in one step, so the old one steps aside first.
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
    try:
        target.replace(old)
        try:
            new.replace(target)
        except OSError:
            old.replace(target)
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(
            f"cannot read {path}: {error.strerror}. Give a folder written by save()."
        ) from error
    except ValueError as error:
        raise ArtifactError(f"{path} is no JSON ({error}). Fit and save it again.") from error
    if not isinstance(record, dict):
        raise ArtifactError(f"{path} is no artifact. Give a folder written by save().")
    return cast("dict[str, Any]", record)


def _check_record(record: Mapping[str, Any], folder: Path, kind: str) -> None:
    version = record.get("format_version")
    if version != FORMAT_VERSION:
        raise ArtifactError(
            f"artifact {folder} has format version {version!r}; this Safebridge reads "
            f"{FORMAT_VERSION}. Install the version that wrote it "
            f"({record.get('package_version', 'unknown')}) or fit again."
        )
    _check_keys(set(record), _KEYS, folder, "keys")
    if record["kind"] != kind:
        raise ArtifactError(
            f"artifact {folder} is of kind '{record['kind']}', expected '{kind}'. "
            f"Load it with the method '{record['kind']}'."
        )
    for name in ("config", "metadata", "tensors"):
        if not isinstance(record[name], dict):
            raise ArtifactError(f"artifact {folder}: '{name}' is no table. Fit and save it again.")


def _check_keys(found: set[str], expected: set[str], folder: Path, what: str) -> None:
    missing, extra = sorted(expected - found), sorted(found - expected)
    if missing or extra:
        raise ArtifactError(
            f"artifact {folder} has missing {what} {missing} and unknown {what} {extra}. "
            "It was altered or written by another version; fit and save it again."
        )


def _read_metadata(values: Mapping[str, Any], folder: Path) -> ArtifactMetadata:
    names = {item.name for item in fields(ArtifactMetadata)}
    _check_keys(set(values), names, folder, "metadata")
    return ArtifactMetadata(**values)


def _read_tensors(record: Mapping[str, Any], folder: Path) -> dict[str, torch.Tensor]:
    path = folder / TENSORS_NAME
    try:
        blob = path.read_bytes()
    except OSError as error:
        raise ArtifactError(
            f"cannot read {path}: {error.strerror}. Copy the whole artifact folder."
        ) from error
    found = hashlib.sha256(blob).hexdigest()
    if found != record["tensors_sha256"]:
        raise ArtifactError(
            f"{path} has SHA-256 {found[:12]}, {JSON_NAME} says "
            f"{str(record['tensors_sha256'])[:12]}: it is damaged or was altered. Copy it again."
        )
    try:
        tensors: dict[str, torch.Tensor] = load(blob)
    except SafetensorError as error:
        raise ArtifactError(f"{path} is no safetensors file ({error}).") from error
    _check_keys(set(tensors), set(record["tensors"]), folder, "tensors")
    for name, tensor in tensors.items():
        if _describe(tensor) != record["tensors"][name]:
            raise ArtifactError(
                f"artifact {folder}: tensor '{name}' is {_describe(tensor)}, {JSON_NAME} says "
                f"{record['tensors'][name]}. Fit and save it again."
            )
    return tensors
