"""Tensors that are computed once: kept in memory, or in a folder and mapped from there."""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, final

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from safebridge.data.sample import Sample
from safebridge.errors import ArtifactError
from safebridge.methods.security_tensors.config import SecurityTensorsConfig
from safebridge.models.load import VLM

__all__ = ["TensorCache", "describe_pictures", "describe_run", "hash_key"]


@final
class TensorCache:
    """Groups of tensors by key.

    With a folder every group is a file, written whole or not at all and mapped into memory when
    it is read, so that a fit needs no more memory than it touches and another fit finds it.

    Args:
        folder: Where the files are; made if missing. None keeps everything in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._known: dict[str, Mapping[str, Tensor]] = {}

    def __contains__(self, key: str) -> bool:
        """Return whether there is a group of this key."""
        return key in self._known or (self.folder is not None and self._path(key).is_file())

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep a group; what was there under the key is replaced.

        Args:
            key: What `hash_key` returned.
            tensors: Tensors by name; copies on the CPU are kept.

        Raises:
            ArtifactError: If the file cannot be written.
        """
        own = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        if self.folder is None:
            self._known[key] = own
            return
        self._known.pop(key, None)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.folder, suffix=".part")
            os.close(handle)
            try:
                save_file(own, name)
                Path(name).replace(self._path(key))
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(name)  # noqa: PTH108 - gone already after a good replace
        except (OSError, SafetensorError) as error:
            raise ArtifactError(
                f"cannot write to the cache {self.folder}: {error}. Free some space, or name a "
                "folder on another disk."
            ) from error

    def get(self, key: str) -> Mapping[str, Tensor]:
        """Return a group on the CPU; not to be written to.

        Args:
            key: A key that is in the cache.

        Raises:
            ArtifactError: If the file is damaged.
        """
        if key not in self._known:
            try:
                with safe_open(self._path(key), framework="pt") as file:
                    self._known[key] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            except (OSError, SafetensorError) as error:
                raise ArtifactError(
                    f"{self._path(key)} cannot be read ({error}). Delete the cache folder; it is "
                    "filled again."
                ) from error
        return self._known[key]

    def _path(self, key: str) -> Path:
        assert self.folder is not None  # noqa: S101 - asked for with a folder only
        return self.folder / f"{key}.safetensors"


def hash_key(*parts: Any) -> str:
    """Return the SHA-256 of JSON values, as a key.

    Args:
        *parts: Everything that the tensors follow from.
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def describe_run(vlm: VLM, config: SecurityTensorsConfig) -> list[Any]:
    """Return what every cached tensor follows from besides its sample.

    Args:
        vlm: The model.
        config: The settings that change what is computed.
    """
    return [vlm.fingerprint, str(vlm.dtype), config.autocast]


def describe_pictures(sample: Sample) -> list[Any]:
    """Return what tells the pictures of a sample from others, without reading them.

    Args:
        sample: Its files must exist.
    """
    found = []
    for path in sample.images:
        status = path.stat()
        found.append([str(path.resolve()), status.st_size, status.st_mtime_ns])
    return found
