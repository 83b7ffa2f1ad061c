"""Hidden states of spans: what decoder layers make of a picture, a caption, a retrieved text."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from safebridge.methods.text_guided_alignment.objective import pool_span
from safebridge.models.hooks import is_preliminary
from safebridge.models.load import VLM
from safebridge.models.tokens import encode

__all__ = ["capture_layers", "capture_text_states", "pool_layers", "shorten_logits"]


@contextmanager
def capture_layers(vlm: VLM, layers: Sequence[int]) -> Iterator[list[Tensor]]:
    """Collect the residual stream after each layer of one forward pass, with its graph.

    The tensors themselves are kept and nothing is computed on them here: under gradient
    checkpointing they are the ones that the layers pass on and that are kept in any case.

    Args:
        vlm: The model.
        layers: Decoder layers from 0, in rising order.

    Yields:
        A list that a forward pass fills with one tensor [batch, seq, hidden] for each
        layer. Clear it before the next pass.
    """
    states: list[Tensor] = []

    def keep(_module: Any, _args: Any, output: Any) -> None:
        if not is_preliminary():
            states.append(output[0] if isinstance(output, tuple) else output)

    with ExitStack() as stack:
        for layer in layers:
            handle = vlm.layout.layer(vlm.model, layer).register_forward_hook(keep)
            stack.callback(handle.remove)
        yield states


def pool_layers(
    states: Sequence[Tensor], span: Bool[Tensor, "batch seq"], *, pooling: str = "mean"
) -> Float[Tensor, "layers batch hidden"]:
    """Pool one span in every layer.

    Args:
        states: What `capture_layers` collected.
        span: Which tokens count.
        pooling: As in `pool_span`.
    """
    return torch.stack(
        [
            pool_span(state, span.to(state.device), pooling=pooling).to(span.device)
            for state in states
        ]
    )


@torch.no_grad()
def capture_text_states(
    vlm: VLM, texts: Sequence[str], layers: Sequence[int], *, pooling: str = "mean"
) -> Float[Tensor, "layers batch hidden"]:
    """Read texts alone, as a user's turn without a picture, and pool their own tokens.

    The turn's markers and a beginning-of-sequence token do not count: the latter is an
    outlier that would decide every mean. An empty text gives zeros.

    Args:
        vlm: The model, with the weights that it has now.
        texts: Captions or retrieved texts.
        layers: Decoder layers from 0, in rising order.
        pooling: As in `pool_span`.

    Returns:
        Pooled states in float32 on the model's device, without a graph.
    """
    # A row of its own for an empty text would have no tokens; any text stands in for it.
    is_empty = torch.tensor([not text.strip() for text in texts], device=vlm.device)
    filled = [text if text.strip() else "-" for text in texts]
    no_images: list[list[Image.Image]] = [[] for _ in filled]
    encoded = encode(vlm, filled, no_images, padding_side="right")
    with capture_layers(vlm, layers) as states:
        vlm.model(**encoded.inputs, use_cache=False, **shorten_logits(vlm, 1))
        pooled = pool_layers(states, encoded.spans.text, pooling=pooling)
    return pooled.masked_fill(is_empty[:, None], 0.0)


def shorten_logits(vlm: VLM, keep: int) -> dict[str, int]:
    """Return the argument that limits the logits to the last positions, if the model has one.

    Args:
        vlm: The model.
        keep: Number of positions.
    """
    has_option = "logits_to_keep" in inspect.signature(vlm.model.forward).parameters
    return {"logits_to_keep": keep} if has_option else {}
