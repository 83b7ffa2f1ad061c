"""States of texts on disk, memory-mapped: each text is read once, later epochs look it up."""

import hashlib
import json
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final, final

import torch
from jaxtyping import Float
from torch import Tensor

from safebridge.errors import ArtifactError

__all__ = ["TextStateCache", "cache_bytes"]

_DTYPES: Final = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_STATES: Final = "states.bin"
_DONE: Final = "done.bin"
_INDEX: Final = "index.json"

Read = Callable[[Sequence[str]], Float[Tensor, "layers batch hidden"]]


def cache_bytes(texts: int, layers: int, hidden: int, dtype: str) -> int:
    """Return the size of a cache's states on disk in bytes.

    Args:
        texts: Number of different texts.
        layers: Number of layers that are kept.
        hidden: Width of the residual stream.
        dtype: "float32", "float16" or "bfloat16".
    """
    return texts * layers * hidden * _DTYPES[dtype].itemsize


@final
class TextStateCache:
    """Pooled states of texts in files that the system pages in as they are needed.

    Filled on first use, so that nothing is read that a short run never asks for. A folder
    can be used again by a later run with the same key; another key empties it.

    Args:
        folder: Where the files are; None takes a temporary folder, gone with the object.
        texts: All texts that will be asked for; repeated ones take one place. Only a digest of
            each is kept in memory.
        shape: Layers and width of what is kept for each text.
        dtype: Type on disk.
        key: What the states depend on besides the texts: model, layers, pooling.

    Raises:
        ArtifactError: If the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path | None,
        texts: Iterable[str],
        shape: tuple[int, int],
        *,
        dtype: str = "float32",
        key: str = "",
    ) -> None:
        if folder is None:
            folder = Path(tempfile.mkdtemp(prefix="safebridge-"))
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self.folder = folder
        self._row = {name: row for row, name in enumerate(dict.fromkeys(map(_name, texts)))}
        size, kind = max(1, len(self._row)), _DTYPES[dtype]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._check_index(_digest([key, dtype, str(shape)], self._row))
            states = torch.from_file(
                str(self.folder / _STATES),
                shared=True,
                size=size * shape[0] * shape[1],
                dtype=kind,
            )
            self._done = torch.from_file(
                str(self.folder / _DONE), shared=True, size=size, dtype=torch.uint8
            )
        except (OSError, RuntimeError) as error:
            raise ArtifactError(
                f"cannot keep text states in {self.folder}: {error}. Choose a folder with "
                f"{cache_bytes(size, *shape, dtype) / 1e9:.1f} GB of room that you may write to."
            ) from error
        self._states = states.view(size, *shape)

    def __len__(self) -> int:
        """Return how many different texts there are."""
        return len(self._row)

    @property
    def filled(self) -> int:
        """How many of them have been read."""
        return int(self._done.sum())

    def look_up(self, texts: Sequence[str], read: Read) -> Float[Tensor, "layers batch hidden"]:
        """Return the states of texts, reading those that are not there yet.

        Args:
            texts: Some of the texts that the cache was made for.
            read: Computes the states of texts.

        Returns:
            States in float32 on the CPU.
        """
        rows = [self._row[_name(text)] for text in texts]
        done = self._done[rows].tolist()
        missing = {
            text: row for text, row, known in zip(texts, rows, done, strict=True) if not known
        }
        if missing:
            found = read(list(missing)).transpose(0, 1)
            places = list(missing.values())
            self._states[places] = found.to(self._states.device, self._states.dtype)
            # Marked after the states are written, so that a stop in between loses nothing.
            self._done[places] = 1
        return self._states[rows].float().transpose(0, 1)

    def _check_index(self, digest: str) -> None:
        path = self.folder / _INDEX
        known = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        if known.get("digest") == digest:
            return
        for name in (_STATES, _DONE):
            (self.folder / name).unlink(missing_ok=True)
        path.write_text(json.dumps({"digest": digest, "texts": len(self._row)}), "utf-8")


def _name(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _digest(parts: Sequence[str], names: Iterable[bytes]) -> str:
    digest = hashlib.sha256("\0".join(parts).encode())
    for name in names:
        digest.update(name)
    return digest.hexdigest()
