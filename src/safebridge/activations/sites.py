"""Where activations are read and revised: five places of a decoder layer, for every family."""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

from safebridge.errors import ShapeError, UnknownNameError
from safebridge.models.layout import VLMLayout
from safebridge.models.load import VLM

__all__ = ["PLACES", "find_layers", "hook_place", "place_shape"]

PLACES: Final = ("resid_in", "resid_out", "attn_out", "mlp_out", "heads")
"""`resid_in` and `resid_out` are the residual stream before and after a decoder layer;
`attn_out` is the output of the attention's output projection and `heads` its input, the heads
side by side; `mlp_out` is the output of the feed-forward block."""

_MODULE_OF: Final = {"attn_out": "attention_output", "heads": "attention_output", "mlp_out": "mlp"}
_AT_INPUT: Final = ("resid_in", "heads")

Hook = Callable[[Tensor], Tensor | None]


def place_shape(layout: VLMLayout, place: str) -> tuple[int, ...]:
    """Return the shape of one token's activation at a place.

    Args:
        layout: The model's layout.
        place: One of `PLACES`.

    Returns:
        (heads, head_dim) for "heads", else (hidden,).

    Raises:
        UnknownNameError: If there is no such place.
    """
    _check_place(place)
    if place == "heads":
        return (layout.num_heads, layout.head_dim)
    return (layout.hidden_size,)


def find_layers(vlm: VLM, *, is_text_only: bool) -> tuple[int, ...]:
    """Return the decoder layers that run, counted from 0.

    Args:
        vlm: The model.
        is_text_only: Whether some prompts have no picture; layers that attend to the picture
            are skipped by the model then.
    """
    skipped = vlm.layout.cross_attention_layers if is_text_only else ()
    return tuple(layer for layer in range(vlm.layout.num_layers) if layer not in skipped)


def hook_place(vlm: VLM, place: str, layer: int, fn: Hook) -> Any:
    """Call `fn` with what flows through one place of one layer.

    Args:
        vlm: The model.
        place: One of `PLACES`.
        layer: The decoder layer from 0; -1 is the last.
        fn: Gets the activations [batch, seq, width], heads side by side. It returns their
            replacement of the same shape, or None to leave them; it must not write into them.

    Returns:
        The handle; its `remove()` takes the hook out.

    Raises:
        UnknownNameError: If there is no such place.
        ShapeError: If there is no such layer.
    """
    _check_place(place)
    layout = vlm.layout
    if place in _MODULE_OF:
        module = layout.in_layer(vlm.model, layer, _MODULE_OF[place])
    else:
        module = layout.layer(vlm.model, layer)
    if place in _AT_INPUT:
        return module.register_forward_pre_hook(_input_hook(fn), with_kwargs=True)
    return module.register_forward_hook(_output_hook(fn))


def _check_place(place: str) -> None:
    if place not in PLACES:
        raise UnknownNameError("place", place, PLACES)


def _input_hook(fn: Hook) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            new = fn(_tensor(args[0], module))
            return None if new is None else ((new, *args[1:]), kwargs)
        new = fn(_tensor(kwargs.get("hidden_states"), module))
        return None if new is None else (args, kwargs | {"hidden_states": new})

    return hook


def _output_hook(fn: Hook) -> Callable[..., Any]:
    def hook(module: nn.Module, _args: Any, output: Any) -> Any:
        is_tuple = isinstance(output, tuple)
        new = fn(_tensor(output[0] if is_tuple else output, module))
        if new is None:
            return None
        return (new, *output[1:]) if is_tuple else new

    return hook


def _tensor(value: Any, module: nn.Module) -> Tensor:
    if not isinstance(value, torch.Tensor):
        raise ShapeError(
            f"{type(module).__name__} handles {type(value).__name__} where a tensor was expected. "
            "Name the decoder layer's parts by hand, see docs/add-a-model.md."
        )
    return value
