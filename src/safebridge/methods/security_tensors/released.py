"""Import of the tensors that the authors released: a PEFT folder and a file of pixel noise."""

import json
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file
from torch import Tensor

from safebridge.artifacts.store import ArtifactMetadata
from safebridge.errors import ArtifactError, SettingError
from safebridge.methods.security_tensors.config import SecurityTensorsConfig
from safebridge.methods.security_tensors.method import SecurityTensors
from safebridge.models.load import VLM

__all__ = ["load_released"]

_CONFIG_NAME: Final = "adapter_config.json"
_KEY: Final = "prompt_embeddings"
_PICTURE_DIMS: Final = 3
_TILED_DIMS: Final = 4


def load_released(
    vlm: VLM,
    *,
    prompt_tuning: Path | str | None = None,
    noise: Path | str | None = None,
    position: str = "prefix",
) -> SecurityTensors:
    """Read tensors in the form in which the authors of the paper saved theirs.

    Nothing is executed: the weights are read from safetensors, or by `torch.load` with
    `weights_only=True`.

    Args:
        vlm: The model that they are for; released tensors do not name theirs.
        prompt_tuning: Folder of a PEFT prompt-tuning adapter (the textual tensor).
        noise: `.pt` file with the visual tensor, [..., channels, height, width]; axes of length
            one in front are dropped, so that [1, 1, 4, 3, 560, 560] of Llama 3.2 Vision gives
            each of four tiles its own.
        position: Where the virtual tokens go; "prefix" is what the authors' code does.

    Returns:
        A security tensor that can be applied and saved.

    Raises:
        ArtifactError: If a file is missing, damaged, or no such tensor.
        SettingError: If neither is named.
        ShapeError: If the virtual tokens have another width than the model, when it is applied.
    """
    if prompt_tuning is None and noise is None:
        raise SettingError("nothing to import. Name prompt_tuning=FOLDER, noise=FILE or both.")
    tensors: dict[str, Tensor] = {}
    if prompt_tuning is not None:
        tensors["tokens"] = _load_tokens(Path(prompt_tuning))
    if noise is not None:
        tensors["pixels"] = _load_pixels(Path(noise))
    modality = "both" if len(tensors) > 1 else ("textual" if "tokens" in tensors else "visual")
    tokens = tensors.get("tokens")
    defaults = SecurityTensorsConfig()
    config = SecurityTensorsConfig(
        modality=modality,
        position=position,
        num_virtual_tokens=defaults.num_virtual_tokens if tokens is None else len(tokens),
    )
    names = [Path(source).name for source in (prompt_tuning, noise) if source is not None]
    metadata = ArtifactMetadata(
        base_model=vlm.name,
        revision=vlm.revision,
        fingerprint=vlm.fingerprint,
        data_source=f"imported from {', '.join(names)}",
        seed=config.seed,
        details={"is_imported": True},
    )
    return SecurityTensors(config, tensors, metadata)


def _load_tokens(folder: Path) -> Tensor:
    path = folder / _CONFIG_NAME
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"cannot read {path}: {error}. Give the folder that PEFT wrote, with "
            f"{_CONFIG_NAME} in it."
        ) from error
    kind = record.get("peft_type") if isinstance(record, dict) else None
    if kind != "PROMPT_TUNING":
        raise ArtifactError(
            f"{folder} is a PEFT adapter of type {kind!r}, expected 'PROMPT_TUNING'. Give the "
            "folder of a textual tensor."
        )
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        weights = folder / "adapter_model.bin"
    found = _read_weights(weights)
    tokens = found.get(_KEY) if isinstance(found, dict) else None
    expected = [record.get("num_virtual_tokens"), record.get("token_dim")]
    if not isinstance(tokens, Tensor) or list(tokens.shape) != expected:
        shape = list(tokens.shape) if isinstance(tokens, Tensor) else "no such tensor"
        raise ArtifactError(
            f"{weights}: '{_KEY}' is {shape}, but {_CONFIG_NAME} says {expected}. Copy the whole "
            "folder again."
        )
    return tokens.detach().float().contiguous()


def _load_pixels(path: Path) -> Tensor:
    noise = _read_weights(path)
    if isinstance(noise, dict) and len(noise) == 1:
        (noise,) = noise.values()
    if not isinstance(noise, Tensor):
        raise ArtifactError(
            f"{path} holds {type(noise).__name__}, expected one tensor. Give the file of a visual "
            "tensor."
        )
    pixels = noise.detach().float()
    while pixels.ndim > _PICTURE_DIMS and pixels.shape[0] == 1:
        pixels = pixels[0]
    if pixels.ndim not in {_PICTURE_DIMS, _TILED_DIMS}:
        raise ArtifactError(
            f"{path} holds a tensor of shape {list(noise.shape)}, expected [..., channels, height, "
            "width] with at most an axis of tiles in front."
        )
    return pixels.contiguous()


def _read_weights(path: Path) -> Any:
    """Read tensors without running anything that is in the file."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise ArtifactError(
            f"cannot read tensors from {path}: {reason} Give the file as it was released; files "
            "that hold more than tensors are refused, because reading them would run code."
        ) from error
