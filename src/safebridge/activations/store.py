"""Activations on disk: shards of safetensors with their sample index, resumable, shared out."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from safebridge.activations.capture import capture_batches, choose_layers
from safebridge.activations.sites import place_shape
from safebridge.data.sample import Sample
from safebridge.errors import ArtifactError, UnknownNameError
from safebridge.models.load import VLM
from safebridge.optional import require

__all__ = ["ActivationStore", "capture_to_disk", "open_store"]

_INDEX: Final = "index.json"
_FORMAT: Final = 1


@final
@dataclass(frozen=True)
class ActivationStore:
    """A folder of captured activations; nothing is read until it is asked for."""

    folder: Path
    """Where it is."""

    ids: tuple[str, ...]
    """Ids of the samples, one for each row."""

    set_names: tuple[str, ...]
    """Sets of the samples."""

    places: tuple[str, ...]
    """What was captured."""

    layers: tuple[int, ...]
    """Decoder layers from 0."""

    read_position: str
    """Where it was read."""

    shapes: Mapping[str, tuple[int, ...]]
    """Shape of one token's activation by place."""

    shard_size: int
    """Samples in one file."""

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.ids)

    def read(self, place: str, layer: int) -> Tensor:
        """Read one place of one layer for all samples.

        Args:
            place: One of `places`.
            layer: One of `layers`.

        Returns:
            Float32 [n, hidden], or [n, heads, head_dim] for "heads".

        Raises:
            UnknownNameError: If it was not captured.
            ArtifactError: If a file is missing or damaged.
        """
        if place not in self.places:
            raise UnknownNameError("captured place", place, self.places)
        if layer not in self.layers:
            raise UnknownNameError("captured layer", str(layer), map(str, self.layers))
        parts = []
        for number in range(_num_shards(len(self), self.shard_size)):
            path = _shard_path(self.folder, number)
            try:
                with safe_open(path, framework="pt") as file:
                    parts.append(file.get_tensor(_key(place, layer)))
            except (OSError, SafetensorError) as error:
                raise ArtifactError(
                    f"cannot read {path}: {error}. Run the capture again; what is whole is kept."
                ) from error
        states: Tensor = torch.cat(parts).unflatten(1, self.shapes[place])
        return states


def capture_to_disk(
    vlm: VLM,
    samples: Sequence[Sample],
    folder: Path | str,
    *,
    places: Sequence[str] = ("resid_out",),
    layers: Sequence[int] | None = None,
    read_position: str = "last_prompt_token",
    batch_size: int = 16,
    shard_size: int = 512,
    progress: Callable[[int], object] | None = None,
) -> ActivationStore:
    """Read activations of any number of samples, one file for each `shard_size` of them.

    A file is written whole or not at all, and what is there already is kept, so a capture
    that was stopped goes on where it was. Under `accelerate launch` the processes take turns
    at the files; all of them return when the last one is written.

    Args:
        vlm: The model; it is as it was afterwards.
        samples: As in `capture_activations`.
        folder: Where to; made if missing.
        places: As in `capture_activations`.
        layers: As in `capture_activations`.
        read_position: As in `capture_activations`.
        batch_size: Samples in one pass.
        shard_size: Samples in one file, which are held in memory together.
        progress: Called with the number of samples done, those on disk already included.

    Returns:
        The store.

    Raises:
        ArtifactError: If the folder holds another capture, or cannot be written.
        DataError: As `capture_activations`.
        SettingError: As `capture_activations`.
    """
    folder = Path(folder)
    chosen = choose_layers(vlm, samples, layers)
    index = {
        "format": _FORMAT,
        "fingerprint": vlm.fingerprint,
        "samples_sha256": _digest(samples),
        "places": list(places),
        "layers": list(chosen),
        "read_position": read_position,
        "shard_size": shard_size,
        "shapes": {place: list(place_shape(vlm.layout, place)) for place in places},
        "ids": [sample.id for sample in samples],
        "set_names": [sample.set_name for sample in samples],
    }
    rank, world, wait = _find_process()
    if rank == 0:
        _write_index(folder, index)
    wait()
    for number in range(rank, _num_shards(len(samples), shard_size), world):
        part = samples[number * shard_size : (number + 1) * shard_size]
        path = _shard_path(folder, number)
        if not path.exists():
            tensors = _capture_shard(vlm, part, places, chosen, read_position, batch_size)
            _write_whole(path, partial(save_file, tensors))
        if progress is not None:
            progress(len(part))
    wait()
    return open_store(folder)


def open_store(folder: Path | str) -> ActivationStore:
    """Open a folder that `capture_to_disk` wrote.

    Args:
        folder: The folder.

    Raises:
        ArtifactError: If it is none, or files are missing.
    """
    folder = Path(folder)
    index = _read_index(folder)
    try:
        store = ActivationStore(
            folder=folder,
            ids=tuple(index["ids"]),
            set_names=tuple(index["set_names"]),
            places=tuple(index["places"]),
            layers=tuple(index["layers"]),
            read_position=index["read_position"],
            shapes={place: tuple(shape) for place, shape in index["shapes"].items()},
            shard_size=index["shard_size"],
        )
    except KeyError as error:
        raise ArtifactError(
            f"{folder / _INDEX} lacks {error}. Capture again into another folder."
        ) from error
    numbers = range(_num_shards(len(store), store.shard_size))
    missing = [number for number in numbers if not _shard_path(folder, number).exists()]
    if missing:
        raise ArtifactError(
            f"{folder} lacks {len(missing)} of {len(numbers)} files: the capture was stopped. Run "
            "it again with the same arguments; what is whole is kept."
        )
    return store


def _capture_shard(  # noqa: PLR0917 - the arguments of `capture_to_disk`, handed on
    vlm: VLM,
    samples: Sequence[Sample],
    places: Sequence[str],
    layers: Sequence[int],
    read_position: str,
    batch_size: int,
) -> dict[str, Tensor]:
    """Return the tensors of one file, rows in the order of the samples."""
    tensors: dict[str, Tensor] = {}
    batches = capture_batches(
        vlm,
        samples,
        places=places,
        layers=layers,
        read_position=read_position,
        batch_size=batch_size,
    )
    for rows, found in batches:
        for (place, layer), states in found.items():
            key = _key(place, layer)
            if key not in tensors:
                tensors[key] = torch.empty(len(samples), states.shape[1])
            tensors[key][rows] = states.cpu()
    return tensors


def _key(place: str, layer: int) -> str:
    return f"{place}.{layer}"


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:06d}.safetensors"


def _num_shards(count: int, shard_size: int) -> int:
    return -(-count // shard_size)


def _digest(samples: Sequence[Sample]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        record = [sample.id, sample.prompt, sample.answer, [str(path) for path in sample.images]]
        digest.update(json.dumps(record).encode())
    return digest.hexdigest()


def _find_process() -> tuple[int, int, Callable[[], object]]:
    """Return number, count and barrier of the processes of `accelerate launch`."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1, lambda: None
    state = require("accelerate", extra="training").PartialState()
    return state.process_index, state.num_processes, state.wait_for_everyone


def _write_index(folder: Path, index: Mapping[str, Any]) -> None:
    """Write the index, or check that the one that is there says the same."""
    if (folder / _INDEX).exists():
        found = _read_index(folder)
        other = sorted(key for key in index if found.get(key) != index[key])
        if other:
            raise ArtifactError(
                f"{folder} holds another capture, which differs in {', '.join(other)}. Choose "
                "another folder, or delete it to start over."
            )
        return
    text = json.dumps(index)
    _write_whole(folder / _INDEX, lambda target: target.write_text(text, encoding="utf-8"))


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / _INDEX
    try:
        index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"cannot read {path}: {error}. Give a folder written by capture_to_disk."
        ) from error
    if index.get("format") != _FORMAT:
        raise ArtifactError(
            f"{path} has format {index.get('format')!r}; this Safebridge reads {_FORMAT}. Capture "
            "again into another folder."
        )
    return index


def _write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its place and move it there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        os.close(handle)
        try:
            write(Path(name))
            Path(name).chmod(0o644)  # mkstemp makes it private
            Path(name).replace(path)
        finally:
            with suppress(FileNotFoundError):
                Path(name).unlink()
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"cannot write {path}: {error}. Free some space or choose a folder you may write to; "
            "files that are whole are kept."
        ) from error
