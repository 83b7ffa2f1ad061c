"""The trainable parts of a security tensor and how they start."""

from typing import Any, final

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from safebridge.errors import SettingError, ShapeError
from safebridge.methods.security_tensors.config import SecurityTensorsConfig
from safebridge.models.load import VLM

__all__ = ["SecurityTensorModule", "add_pixels", "build_module", "draw_pixels", "draw_tokens"]

PICTURE_DIMS = 3  # channels, height, width


@final
class SecurityTensorModule(nn.Module):
    """Holds the virtual tokens and the pixel tensor in float32.

    Args:
        tokens: Virtual token embeddings, or None.
        pixels: Tensor added to preprocessed pictures, or None.
    """

    def __init__(
        self,
        tokens: Float[Tensor, "n hidden"] | None,
        pixels: Float[Tensor, "channels height width"] | None,
    ) -> None:
        super().__init__()
        self.tokens = None if tokens is None else nn.Parameter(tokens.float().clone())
        self.pixels = None if pixels is None else nn.Parameter(pixels.float().clone())

    def tensors(self) -> dict[str, Tensor]:
        """Return detached copies of what it holds, by name."""
        return {name: value.detach().clone() for name, value in self.named_parameters()}


def build_module(
    vlm: VLM, config: SecurityTensorsConfig, pixel_values: Tensor | None
) -> SecurityTensorModule:
    """Draw the start values of a security tensor for one model.

    Args:
        vlm: The model; it is not changed.
        config: Which parts there are and how they start.
        pixel_values: Preprocessed pictures of any sample, for the shape of the pixel tensor.

    Raises:
        SettingError: If a visual tensor is asked for and the pictures have no fixed size.
    """
    generator = torch.Generator().manual_seed(config.seed)
    tokens = draw_tokens(vlm, config, generator) if config.has_text else None
    pixels = draw_pixels(vlm, config, generator, pixel_values) if config.has_visual else None
    return SecurityTensorModule(tokens, pixels).to(vlm.device)


def draw_tokens(
    vlm: VLM, config: SecurityTensorsConfig, generator: torch.Generator
) -> Float[Tensor, "n hidden"]:
    """Draw the start of the virtual tokens.

    "random" is standard normal, as PEFT's prompt tuning starts in the authors' code.
    "embeddings" takes what the embedding gives for random tokens of the vocabulary, so
    that the start has the length of ordinary token embeddings (ours).

    Args:
        vlm: The model whose width and embedding are used.
        config: Number of tokens and kind of start.
        generator: Source of randomness, on the CPU.

    Source:
        Li et al. 2025, "Security Tensors as a Cross-Modal Bridge" (arXiv:2507.20994).
    """
    n, hidden = config.num_virtual_tokens, vlm.layout.hidden_size
    if config.init == "random":
        return torch.randn(n, hidden, generator=generator)
    embed: Any = vlm.layout.get(vlm.model, "embed_tokens")
    rows = min(vlm.layout.vocab_size, len(vlm.tokenizer))
    ids = torch.randint(rows, (1, n), generator=generator)
    with torch.no_grad():
        drawn: Tensor = embed(ids.to(vlm.device))[0]
    return drawn.detach().float().cpu()


def draw_pixels(
    vlm: VLM,
    config: SecurityTensorsConfig,
    generator: torch.Generator,
    pixel_values: Tensor | None,
) -> Float[Tensor, "channels height width"]:
    """Draw the start of the pixel tensor: normal, of the configured deviation.

    Args:
        vlm: The model, for the error message.
        config: The standard deviation.
        generator: Source of randomness, on the CPU.
        pixel_values: Preprocessed pictures; the last three axes give the shape.

    Raises:
        SettingError: If there are no pictures, or they are lists of patches.
    """
    if pixel_values is None or pixel_values.ndim <= PICTURE_DIMS:
        found = "no picture" if pixel_values is None else f"{list(pixel_values.shape)} patches"
        raise SettingError(
            f"a visual tensor needs pictures of fixed size; {vlm.layout.family} got {found}. "
            'Use modality="textual".'
        )
    shape = tuple(pixel_values.shape[-PICTURE_DIMS:])
    return torch.randn(shape, generator=generator) * config.visual_init_std


def add_pixels(
    pixel_values: Shaped[Tensor, "..."],
    pixels: Float[Tensor, "channels height width"],
    *,
    strength: float = 1.0,
) -> Shaped[Tensor, "..."]:
    r"""Add the pixel tensor to every preprocessed picture and tile.

    Computes $x' = x + \alpha\,\delta$ out of place, in the type of `pixel_values`.
    Pictures of zeros only are padding and stay zero, because some models recognise
    padding by that.

    Args:
        pixel_values: Preprocessed pictures, any axes before channels, height and width.
        pixels: The visual tensor, in units of preprocessed pixels.
        strength: The factor $\alpha$; 0 is the identity.

    Raises:
        ShapeError: If the pictures have another size than the tensor.
    """
    if pixel_values.ndim <= PICTURE_DIMS or pixel_values.shape[-PICTURE_DIMS:] != pixels.shape:
        raise ShapeError(
            f"the visual tensor is {list(pixels.shape)} but the pictures are "
            f"{list(pixel_values.shape)}. Use the processor it was fitted with, or fit again."
        )
    is_picture = pixel_values.ne(0).flatten(-PICTURE_DIMS).any(dim=-1)[..., None, None, None]
    delta = strength * pixels.to(pixel_values.device, pixel_values.dtype)
    return pixel_values + delta * is_picture
