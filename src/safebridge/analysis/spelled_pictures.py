"""What a perfect projector would bring: a picture's tokens spelled as the name of what it shows."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from safebridge.data.sample import Sample, open_images
from safebridge.errors import DataError, SettingError
from safebridge.models.generate import answer_encoded
from safebridge.models.hooks import is_preliminary
from safebridge.models.load import VLM
from safebridge.models.tokens import encode

__all__ = ["answer_spelled", "can_spell", "measure_spelled", "spell_image_tokens"]


def can_spell(vlm: VLM) -> bool:
    """Return whether a model's pictures become tokens of the decoder.

    Args:
        vlm: The model.
    """
    return not vlm.layout.cross_attention_layers and vlm.layout.image_token_id is not None


@contextmanager
def spell_image_tokens(
    vlm: VLM, names: Sequence[str], image_mask: Bool[Tensor, "batch seq"]
) -> Iterator[None]:
    """Write a name's word embeddings over the image tokens that enter the first decoder layer.

    The name's tokens are repeated in turn until all image tokens of the row are one of them.
    Positions stay those of the picture, and what a model adds to its image tokens in later
    layers (Qwen3-VL) stays as well. Only passes over the whole prompt are changed, so that a
    cached continuation goes on from the changed prompt.

    Args:
        vlm: The model; given back as it was, also on an error.
        names: What each row's picture shows, in words.
        image_mask: True at image tokens, `spans.image` of the prompt.

    Yields:
        Nothing.

    Raises:
        SettingError: If the model's pictures have no tokens, or no pass over the whole prompt came
            by, e.g. because a defense puts tokens of its own into it.
        DataError: If there are not as many names as rows, or one is empty.
    """
    if not can_spell(vlm):
        raise SettingError(
            f"{vlm.name} reads pictures by cross-attention, so there are no image tokens to write "
            "a name over. Use a model whose pictures become tokens."
        )
    if len(names) != len(image_mask):
        raise DataError(f"{len(names)} names for {len(image_mask)} prompts. Give one for each.")
    spelled = [_embed(vlm, name) for name in names]
    passes = 0

    def write(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal passes
        hidden = args[0] if args else kwargs["hidden_states"]
        if is_preliminary() or hidden.shape[:2] != image_mask.shape:
            return None
        passes += 1
        new = hidden.clone()
        for row, (mask, own) in enumerate(zip(image_mask, spelled, strict=True)):
            places = mask.nonzero()[:, 0].to(hidden.device)
            turn = torch.arange(len(places), device=own.device) % len(own)
            new[row, places] = own[turn].to(hidden.device, hidden.dtype)
        if args:
            return (new, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": new}

    first = vlm.layout.layer(vlm.model, 0)
    handle = first.register_forward_pre_hook(write, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
    if not passes:
        raise SettingError(
            f"no pass over all {image_mask.shape[1]} positions of the prompt was seen, so no name "
            "was written. Encode with `safebridge.models.tokens.encode` and without a defense that "
            "adds tokens."
        )


@torch.inference_mode()
def answer_spelled(
    vlm: VLM,
    samples: Sequence[Sample],
    names: Sequence[str],
    *,
    max_new_tokens: int = 20,
    batch_size: int = 8,
) -> list[str]:
    """Answer requests beside pictures whose tokens spell a name.

    Args:
        vlm: The model.
        samples: Requests with pictures.
        names: What each sample's picture shows, in words.
        max_new_tokens: Longest answer in tokens.
        batch_size: Requests answered together.

    Returns:
        Greedy answers, in the order of the samples.

    Raises:
        DataError: If a sample lacks a picture, or names are missing.
        SettingError: If the model's pictures have no tokens.
    """
    for sample in samples:
        if not sample.images:
            raise DataError(f"sample '{sample.id}' needs a picture, whose tokens are spelled.")
    if len(names) != len(samples):
        raise DataError(f"{len(names)} names for {len(samples)} samples. Give one for each.")
    answers: list[str] = []
    for start in range(0, len(samples), batch_size):
        part = samples[start : start + batch_size]
        encoded = encode(
            vlm, [s.prompt for s in part], [open_images(s) for s in part], padding_side="left"
        )
        with spell_image_tokens(vlm, names[start : start + batch_size], encoded.spans.image):
            answers += answer_encoded(vlm, encoded, max_new_tokens)
    return answers


def measure_spelled(
    vlm: VLM,
    samples: Sequence[Sample],
    names: Sequence[str],
    is_refusal: Callable[[str], bool],
    *,
    max_new_tokens: int = 20,
    batch_size: int = 8,
) -> tuple[bool, ...]:
    """Say which requests are refused when the picture's tokens spell what it shows.

    It tells the two halves of a gap apart. If the model refuses here and not beside the picture,
    the picture's tokens do not say what is shown, and aligning them can help. If it answers here
    as well, the language model does not connect a request with a thing that stands in the
    picture's place, and no projector will make it.

    Args:
        vlm: The model.
        samples: Requests with pictures.
        names: What each sample's picture shows, in words.
        is_refusal: Judge of an answer.
        max_new_tokens: Longest answer in tokens.
        batch_size: Requests answered together.

    Returns:
        Whether each request is refused.

    Raises:
        DataError: If a sample lacks a picture, or names are missing.
        SettingError: If the model's pictures have no tokens.
    """
    answers = answer_spelled(
        vlm, samples, names, max_new_tokens=max_new_tokens, batch_size=batch_size
    )
    return tuple(map(is_refusal, answers))


def _embed(vlm: VLM, name: str) -> Tensor:
    """Return the word embeddings of a name's tokens, as in the middle of a sentence."""
    ids = vlm.tokenizer(f" {name.strip()}", add_special_tokens=False)["input_ids"]
    if not name.strip() or not ids:
        raise DataError("a name is empty. Say in words what the picture shows.")
    table = vlm.layout.get(vlm.model, "embed_tokens")
    found: Tensor = table(torch.tensor(ids, device=vlm.device)).detach()
    return found
