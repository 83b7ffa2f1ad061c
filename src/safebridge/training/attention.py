"""The attention that trains fastest on the device at hand."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from safebridge.models.load import VLM

__all__ = ["quick_attention"]


@contextmanager
def quick_attention(vlm: VLM) -> Iterator[None]:
    """Let the decoder multiply attention out on a CPU, where the fused backward pass is slow.

    That pays where rows are short, as those of a fit are.

    Args:
        vlm: The model; given back as it was.

    Yields:
        Nothing.
    """
    decoder: Any = vlm.layout.get(vlm.model, "language_model")
    is_slow = vlm.device.type == "cpu" and decoder.config._attn_implementation == "sdpa"  # noqa: SLF001 - no public way to ask
    if is_slow:
        decoder.set_attn_implementation("eager")
    try:
        yield
    finally:
        if is_slow:
            decoder.set_attn_implementation("sdpa")
