"""Where a vision-language model keeps its parts: dotted module paths and sizes."""

from dataclasses import dataclass, fields
from typing import Final, final

from torch import nn

from safebridge.errors import LayoutError, ShapeError

__all__ = ["LAYER_PLACES", "MODEL_PLACES", "VLMLayout", "find_module"]

MODEL_PLACES: Final = (
    "vision_tower",
    "projector",
    "language_model",
    "decoder_layers",
    "final_norm",
    "lm_head",
    "embed_tokens",
)
"""Places that a model has once; their paths start at the model."""

LAYER_PLACES: Final = ("attention", "attention_output", "mlp")
"""Places that every decoder layer has; their paths start at the layer."""

_CROSS_ATTENTION_PLACES: Final = {
    "attention": "cross_attention",
    "attention_output": "cross_attention_output",
}


@final
@dataclass(frozen=True, kw_only=True)
class VLMLayout:
    """Dotted paths and sizes of one vision-language model.

    A field left at its default is found when the layout is handed to `find_layout` or
    `load_vlm`; a field that is set by hand is kept, so naming one odd module is enough.
    """

    family: str = ""
    """Name of the architecture's family, e.g. "llava"."""

    vision_tower: str = ""
    """Path of the image encoder."""

    projector: str = ""
    """Path of the module whose output has the decoder's width, one row per image token."""

    language_model: str = ""
    """Path of the decoder stack without its head."""

    decoder_layers: str = ""
    """Path of the list of decoder layers."""

    final_norm: str = ""
    """Path of the norm between the last decoder layer and the head."""

    lm_head: str = ""
    """Path of the output projection to the vocabulary."""

    embed_tokens: str = ""
    """Path of the token embedding."""

    attention: str = ""
    """Path of the self-attention, from the layer."""

    attention_output: str = ""
    """Path of the attention's output projection, from the layer; its input holds the heads."""

    mlp: str = ""
    """Path of the feed-forward block, from the layer."""

    cross_attention: str = ""
    """Path of the attention in a cross-attention layer, from the layer; empty without any."""

    cross_attention_output: str = ""
    """Path of that attention's output projection, from the layer; empty without any."""

    image_token_id: int | None = None
    """Token that marks image positions in `input_ids`; None if nothing marks them."""

    hidden_size: int = 0
    """Width of the residual stream."""

    num_layers: int = 0
    """Number of decoder layers, cross-attention layers included."""

    num_heads: int = 0
    """Number of query heads of one decoder layer."""

    num_kv_heads: int = 0
    """Number of key and value heads of one decoder layer."""

    head_dim: int = 0
    """Width of one head."""

    vocab_size: int = 0
    """Number of rows of the head."""

    vision_hidden_size: int = 0
    """Width of the image encoder."""

    cross_attention_layers: tuple[int, ...] = ()
    """Decoder layers that attend to the image instead of to the text."""

    def get(self, model: nn.Module, place: str) -> nn.Module:
        """Return the module at one of `MODEL_PLACES`.

        Args:
            model: The model that this layout describes.
            place: A place, e.g. "projector".

        Returns:
            The module itself, not a copy.

        Raises:
            LayoutError: If the place has no path or the model has no such module.
        """
        if place not in MODEL_PLACES:
            raise LayoutError(f"no place '{place}'. Known: {', '.join(MODEL_PLACES)}")
        return find_module(model, getattr(self, place), place)

    def layer_index(self, layer: int) -> int:
        """Return `layer` counted from 0; negative numbers count from the end.

        Args:
            layer: A decoder layer, from `-num_layers` to `num_layers - 1`.

        Returns:
            The index from 0.

        Raises:
            ShapeError: If the model has no such layer.
        """
        if not -self.num_layers <= layer < self.num_layers:
            raise ShapeError(
                f"no decoder layer {layer}: this {self.family or 'model'} has {self.num_layers}. "
                f"Name one from 0 to {self.num_layers - 1}, or count back from -1."
            )
        return layer % self.num_layers

    def layer(self, model: nn.Module, layer: int) -> nn.Module:
        """Return one decoder layer.

        Args:
            model: The model that this layout describes.
            layer: Its number from 0; -1 is the last.

        Returns:
            The module whose output is the residual stream after that layer.

        Raises:
            LayoutError: If the model has no such module.
            ShapeError: If the model has no such layer.
        """
        return find_module(
            model, f"{self.decoder_layers}.{self.layer_index(layer)}", "decoder_layers"
        )

    def in_layer(self, model: nn.Module, layer: int, place: str) -> nn.Module:
        """Return the module at one of `LAYER_PLACES` of one decoder layer.

        In a cross-attention layer "attention" and "attention_output" are those of the
        cross-attention, which is the only attention that such a layer has.

        Args:
            model: The model that this layout describes.
            layer: The layer's number from 0; -1 is the last.
            place: A place, e.g. "attention_output".

        Returns:
            The module itself, not a copy.

        Raises:
            LayoutError: If the place has no path or the layer has no such module.
            ShapeError: If the model has no such layer.
        """
        if place not in LAYER_PLACES:
            raise LayoutError(f"no place '{place}'. Known: {', '.join(LAYER_PLACES)}")
        name = place
        if self.layer_index(layer) in self.cross_attention_layers:
            name = _CROSS_ATTENTION_PLACES.get(place, place)
        return find_module(self.layer(model, layer), getattr(self, name), name)

    def check(self, model: nn.Module) -> None:
        """Resolve every path of this layout.

        Args:
            model: The model that this layout describes.

        Raises:
            LayoutError: If a path is empty or leads nowhere; the message names it.
        """
        for place in MODEL_PLACES:
            self.get(model, place)
        for layer in range(self.num_layers):
            for place in LAYER_PLACES:
                self.in_layer(model, layer, place)

    def describe(self) -> str:
        """Return this layout as the Python expression that names every set field."""
        values = ((field.name, getattr(self, field.name), field.default) for field in fields(self))
        named = (f"{name}={value!r}" for name, value, default in values if value != default)
        return f"VLMLayout({', '.join(named)})"


def find_module(root: nn.Module, path: str, place: str) -> nn.Module:
    """Return the module at a dotted path.

    Args:
        root: Where the path starts.
        path: The path, e.g. "model.language_model.norm".
        place: What the module is to the layout, for the message.

    Returns:
        The module itself, not a copy.

    Raises:
        LayoutError: If the path is empty or leads nowhere; the message names it.
    """
    owner = type(root).__name__
    if not path:
        raise LayoutError(
            f'no {place} named for {owner}. Pass layout=VLMLayout({place}="<path>", ...) '
            "or see docs/add-a-model.md."
        )
    try:
        return root.get_submodule(path)
    except AttributeError as error:
        raise LayoutError(
            f"no {place} at '{path}' in {owner}: {error}. Pass layout=VLMLayout({place}="
            '"<path>", ...) with a path from model.named_modules(), or see docs/add-a-model.md.'
        ) from error
