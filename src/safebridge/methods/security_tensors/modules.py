"""The trainable parts of a security tensor and how they start."""

from collections.abc import Mapping
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from safebridge.errors import SettingError
from safebridge.methods.security_tensors.config import SecurityTensorsConfig
from safebridge.methods.security_tensors.pixels import find_picture_shape
from safebridge.models.load import VLM

__all__ = ["SecurityTensorModule", "build_module", "draw_pixels", "draw_tokens"]


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
        pixels: Float[Tensor, "*tiles channels height width"] | None,
    ) -> None:
        super().__init__()
        self.tokens = None if tokens is None else nn.Parameter(tokens.float().clone())
        self.pixels = None if pixels is None else nn.Parameter(pixels.float().clone())

    def tensors(self) -> dict[str, Tensor]:
        """Return detached copies of what it holds, by name."""
        return {name: value.detach().clone() for name, value in self.named_parameters()}

    def part(self, *names: str) -> "SecurityTensorModule":
        """Return a module that shares the named parameters and has no others.

        Args:
            *names: "tokens" and/or "pixels".
        """
        part = SecurityTensorModule(None, None)
        part.tokens = self.tokens if "tokens" in names else None
        part.pixels = self.pixels if "pixels" in names else None
        return part


def build_module(
    vlm: VLM, config: SecurityTensorsConfig, inputs: Mapping[str, Tensor] | None
) -> SecurityTensorModule:
    """Draw the start values of a security tensor for one model.

    Args:
        vlm: The model; it is not changed.
        config: Which parts there are and how they start.
        inputs: The model's inputs for any sample with a picture, for the shape of the pixel
            tensor; None without one.

    Raises:
        SettingError: If a visual tensor is asked for and there is no picture.
    """
    generator = torch.Generator().manual_seed(config.seed)
    tokens = draw_tokens(vlm, config, generator) if config.has_text else None
    pixels = draw_pixels(vlm, config, generator, inputs) if config.has_visual else None
    return SecurityTensorModule(tokens, pixels).to(vlm.device)


def draw_tokens(
    vlm: VLM, config: SecurityTensorsConfig, generator: torch.Generator
) -> Float[Tensor, "n hidden"]:
    """Draw the start of the virtual tokens.

    "random" is standard normal, as PEFT's prompt tuning starts in the authors' code.
    "embeddings" takes what the embedding gives for random tokens of the vocabulary, so
    that the start has the length of ordinary token embeddings (ours). "text" takes the
    tokens of a text, as PEFT's prompt tuning can.

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
    if config.init == "text":
        words = vlm.tokenizer(config.init_text, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[words[place % len(words)] for place in range(n)]])
    else:
        rows = min(vlm.layout.vocab_size, len(vlm.tokenizer))
        ids = torch.randint(rows, (1, n), generator=generator)
    with torch.no_grad():
        drawn: Tensor = embed(ids.to(vlm.device))[0]
    return drawn.detach().float().cpu()


def draw_pixels(
    vlm: VLM,
    config: SecurityTensorsConfig,
    generator: torch.Generator,
    inputs: Mapping[str, Tensor] | None,
) -> Float[Tensor, "channels height width"]:
    """Draw the start of the pixel tensor: normal, of the configured deviation.

    Args:
        vlm: The model.
        config: The standard deviation, and the side where pictures have no fixed size.
        generator: Source of randomness, on the CPU.
        inputs: The model's inputs for a sample with a picture.

    Raises:
        SettingError: If there is no picture.
    """
    if inputs is None:
        raise SettingError('a visual tensor needs pictures. Use modality="textual".')
    shape = find_picture_shape(vlm, inputs, side=config.visual_side)
    return torch.randn(shape, generator=generator) * config.visual_init_std
