"""Where the visual tensor meets a model's pictures: fixed sizes, tiles, and any size."""

from collections.abc import Mapping
from typing import Any, Final

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn import functional

from safebridge.errors import SettingError, ShapeError
from safebridge.models.load import VLM

__all__ = [
    "add_pixels",
    "add_to_pictures",
    "find_picture_shape",
    "find_pixel_limits",
    "resample_pixels",
    "split_into_patches",
]

PICTURE_DIMS: Final = 3  # channels, height, width

_PATCHED: Final = frozenset({"qwen2_vl", "qwen2_5_vl", "qwen3_vl"})
"""Their pixel_values are lists of patches, with the grids beside them."""

_SIZED: Final = frozenset({"pixtral", "mistral3"})
"""Their pictures are padded to the largest of a batch, with the sizes beside them."""


def add_to_pictures(
    vlm: VLM,
    inputs: Mapping[str, Any],
    pixels: Float[Tensor, "*tiles channels height width"],
    *,
    strength: float = 1.0,
) -> dict[str, Any]:
    """Return a model's inputs with the visual tensor on every picture.

    Where pictures have one size, and in every tile, the tensor is added as it is. Where
    they come in any size (Qwen-VL, Pixtral), it is resampled to each picture's own
    height and width, which is differentiable in the tensor.

    Args:
        vlm: The model.
        inputs: Keyword arguments of the model; they stay as they are.
        pixels: The visual tensor, in units of preprocessed pixels.
        strength: A factor; 0 is the identity.

    Returns:
        The inputs with new `pixel_values`, or the same ones if there are no pictures.

    Raises:
        ShapeError: If the pictures have another size than the tensor.
        SettingError: If a model of patches is called without their grids.
    """
    values = inputs.get("pixel_values")
    if values is None:
        return dict(inputs)
    family = vlm.layout.family
    if family in _PATCHED:
        delta = _patches_of(vlm, inputs, pixels).to(values.device, values.dtype)
        return dict(inputs) | {"pixel_values": values + strength * delta}
    if family in _SIZED and inputs.get("image_sizes") is not None:
        delta = torch.stack(
            [
                _on_canvas(resample_pixels(pixels, height, width), values.shape[-2:])
                for height, width in inputs["image_sizes"].tolist()
            ]
        ).to(values.device, values.dtype)
        return dict(inputs) | {"pixel_values": values + strength * delta}
    return dict(inputs) | {"pixel_values": add_pixels(values, pixels, strength=strength)}


def add_pixels(
    pixel_values: Shaped[Tensor, "..."],
    pixels: Float[Tensor, "*tiles channels height width"],
    *,
    strength: float = 1.0,
) -> Shaped[Tensor, "..."]:
    r"""Add the pixel tensor to every preprocessed picture and tile.

    Computes $x' = x + \alpha\,\delta$ out of place, in the type of `pixel_values`.
    Pictures of zeros only are padding and stay zero, because some models recognise
    padding by that.

    Args:
        pixel_values: Preprocessed pictures, any axes before channels, height and width.
        pixels: The visual tensor, in units of preprocessed pixels; with an axis of tiles in
            front, each tile gets its own.
        strength: The factor $\alpha$; 0 is the identity.

    Raises:
        ShapeError: If the pictures have another size than the tensor.
    """
    is_list = pixel_values.ndim <= PICTURE_DIMS
    if is_list or pixel_values.shape[-pixels.ndim :] != pixels.shape:
        raise ShapeError(
            f"the visual tensor is {list(pixels.shape)} but the pictures are "
            f"{list(pixel_values.shape)}. Use the processor it was fitted with, or fit again."
        )
    is_picture = pixel_values.ne(0).flatten(-PICTURE_DIMS).any(dim=-1)[..., None, None, None]
    delta = strength * pixels.to(pixel_values.device, pixel_values.dtype)
    return pixel_values + delta * is_picture


def find_picture_shape(
    vlm: VLM, inputs: Mapping[str, Tensor], *, side: int = 0
) -> tuple[int, int, int]:
    """Find the shape that a visual tensor has for a model.

    Args:
        vlm: The model.
        inputs: Its inputs for any sample with a picture.
        side: Height and width where pictures come in any size; 0 takes the first one's.

    Returns:
        Channels, height and width.

    Raises:
        SettingError: If there are no pictures, or they are lists of unknown patches.
    """
    family, values = vlm.layout.family, inputs.get("pixel_values")
    if family in _PATCHED and values is not None:
        patch, _, _ = _patch_sizes(vlm)
        _, rows, columns = inputs["image_grid_thw"][0].tolist()
        return (3, side or rows * patch, side or columns * patch)
    if values is None or values.ndim <= PICTURE_DIMS:
        found = "no picture" if values is None else f"{list(values.shape)} patches"
        raise SettingError(
            f"a visual tensor needs pictures of a form that is known; {family} got {found}. "
            'Use modality="textual".'
        )
    channels, height, width = values.shape[-PICTURE_DIMS:]
    if family in _SIZED:
        height, width = inputs["image_sizes"][0].tolist()
        return (channels, side or height, side or width)
    return (channels, height, width)


def find_pixel_limits(vlm: VLM, max_change_pixels_255: float) -> Float[Tensor, "channels 1 1"]:
    """Turn a bound in pixels into the units of preprocessed pictures.

    Args:
        vlm: The model, whose image processor rescales and divides by a deviation.
        max_change_pixels_255: Largest change of a colour value, from 0 to 255.

    Returns:
        The largest absolute value of each channel of the visual tensor.
    """
    processor = vlm.processor.image_processor
    is_normalized = getattr(processor, "do_normalize", True)
    deviation = processor.image_std if is_normalized else [1.0, 1.0, 1.0]
    if not isinstance(deviation, list | tuple):
        deviation = [deviation] * 3
    factor = processor.rescale_factor if getattr(processor, "do_rescale", True) else 1.0
    limits = max_change_pixels_255 * factor / torch.tensor([float(each) for each in deviation])
    return limits[:, None, None]


def resample_pixels(
    pixels: Float[Tensor, "channels height width"], height: int, width: int
) -> Float[Tensor, "channels rows columns"]:
    """Resample the visual tensor to another size, bilinearly and without aliasing.

    Every value is a weighted mean of the tensor's, so a bound on it holds for the result.

    Args:
        pixels: The visual tensor.
        height: Rows of the result.
        width: Columns of the result.
    """
    if tuple(pixels.shape[-2:]) == (height, width):
        return pixels
    resized = functional.interpolate(
        pixels[None].float(), size=(height, width), mode="bilinear", antialias=True
    )
    return resized[0].to(pixels.dtype)


def split_into_patches(
    picture: Float[Tensor, "channels height width"], *, patch: int, frames: int, merge: int
) -> Float[Tensor, "patches features"]:
    """Lay a picture out as the patches that Qwen-VL's image processor writes.

    Patches that are merged into one token follow each other, and every patch is repeated for
    each of the frames that a still picture stands for.

    Args:
        picture: Height and width are multiples of `patch * merge`.
        patch: Side of a patch in pixels.
        frames: Frames in a patch.
        merge: Side in patches of what is merged into one token.
    """
    channels, height, width = picture.shape
    rows, columns = height // (patch * merge), width // (patch * merge)
    split = picture.reshape(channels, rows, merge, patch, columns, merge, patch)
    ordered = split.permute(1, 4, 2, 5, 0, 3, 6)  # row, column, inner row and column, colour
    repeated = ordered[:, :, :, :, :, None].expand(*ordered.shape[:5], frames, patch, patch)
    return repeated.reshape(rows * columns * merge**2, -1)


def _on_canvas(pixels: Tensor, size: torch.Size) -> Tensor:
    """Pad with zeros on the right and below, as the processor pads pictures."""
    return functional.pad(pixels, (0, size[1] - pixels.shape[-1], 0, size[0] - pixels.shape[-2]))


def _patches_of(
    vlm: VLM, inputs: Mapping[str, Any], pixels: Float[Tensor, "channels height width"]
) -> Float[Tensor, "patches features"]:
    """Resample the tensor to every picture's grid and lay it out as its patches."""
    grids = inputs.get("image_grid_thw")
    if grids is None:
        raise SettingError(
            "a visual tensor needs image_grid_thw beside pixel_values. Call the model with the "
            "processor's output."
        )
    patch, frames, merge = _patch_sizes(vlm)
    known: dict[tuple[int, int], Tensor] = {}
    for _, rows, columns in grids.tolist():
        if (rows, columns) not in known:
            own = resample_pixels(pixels, rows * patch, columns * patch)
            known[rows, columns] = split_into_patches(own, patch=patch, frames=frames, merge=merge)
    return torch.cat([known[rows, columns] for _, rows, columns in grids.tolist()])


def _patch_sizes(vlm: VLM) -> tuple[int, int, int]:
    processor = vlm.processor.image_processor
    return processor.patch_size, processor.temporal_patch_size, processor.merge_size
