"""Runs a prompt once for all its answers: keys and values are lent, only answers are computed."""

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor
from transformers import DynamicCache

from safebridge.activations.pooling import AllSeenError, Site, answer_weights, pool_places
from safebridge.activations.sites import hook_place
from safebridge.data.sample import Sample, open_images
from safebridge.models.load import VLM
from safebridge.models.tokens import encode

__all__ = ["can_share", "pack_shared", "run_shared"]

_WHOLE_ONLY: Final = (
    "gemma3",  # image tokens see each other, by types that are told for whole sequences
    "instructblip",  # its forward takes a picture at every step
    "mllama",  # cross-attention masks are for whole sequences
    "paligemma",  # the answer is a second text
    "qwen2_5_vl",  # positions of three axes are for whole sequences, and so below
    "qwen2_vl",
    "qwen3_vl",
)
_ANY_PROMPT: Final = "How?"
_WORTH_IT: Final = 1.5


def can_share(vlm: VLM, samples: Sequence[Sample]) -> bool:
    """Say whether prompts are worth sharing and the model lets us.

    Args:
        vlm: The model; with a method in its `forward` a pass is left whole.
        samples: Samples with answers.
    """
    if vlm.layout.family in _WHOLE_ONLY or "forward" in vlm.model.__dict__:
        return False
    return len(samples) >= _WORTH_IT * len({_prompt_of(sample) for sample in samples})


def pack_shared(samples: Sequence[Sample], size: int) -> list[list[int]]:
    """Return row numbers in batches that keep the answers of a prompt together.

    Args:
        samples: Samples with answers.
        size: Answers in a batch; one prompt with more makes a batch of its own.

    Returns:
        Batches of rows with equally many pictures, rows of one prompt side by side.
    """
    groups: dict[Any, list[int]] = {}
    for row, sample in enumerate(samples):
        groups.setdefault(_prompt_of(sample), []).append(row)
    by_pictures: dict[int, list[list[int]]] = {}
    for rows in groups.values():
        by_pictures.setdefault(len(samples[rows[0]].images), []).append(rows)
    batches: list[list[int]] = []
    for alike in by_pictures.values():
        alike.sort(key=lambda rows: len(samples[rows[0]].prompt), reverse=True)
        batches.append([])
        for rows in alike:
            if batches[-1] and len(batches[-1]) + len(rows) > size:
                batches.append([])
            batches[-1] += rows
    return batches


def run_shared(
    vlm: VLM,
    samples: Sequence[Sample],
    places: Sequence[str],
    layers: Sequence[int],
    *,
    is_mean: bool,
) -> dict[Site, Tensor] | None:
    """Return pooled states of answers, or None if answers and prompts share tokens.

    Args:
        vlm: The model.
        samples: Samples with answers, those of one prompt side by side.
        places: Which places.
        layers: Which decoder layers, from 0.
        is_mean: Pool over the answer instead of its last own token.
    """
    answers = _encode_answers(vlm, [sample.answer or "" for sample in samples])
    if answers is None:
        return None
    ids, is_answer = answers
    numbers: dict[Any, int] = {}
    row_of = [numbers.setdefault(_prompt_of(sample), len(numbers)) for sample in samples]
    first = [samples[row_of.index(number)] for number in numbers.values()]
    prompts = encode(vlm, [s.prompt for s in first], [open_images(s) for s in first])
    rows = torch.tensor(row_of, device=ids.device)
    with torch.no_grad():
        cache = _prefill(vlm, prompts.inputs, max(layers))
        cache.batch_select_indices(rows)
        mask = torch.cat([prompts.inputs["attention_mask"][rows], is_answer.long()], dim=1)
        weights = answer_weights(is_answer, is_mean=is_mean)
        with pool_places(vlm, weights, places, layers) as found:
            try:
                vlm.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
            except AllSeenError:
                return found
    return None


def _prompt_of(sample: Sample) -> Any:
    return (sample.prompt, sample.images)


def _encode_answers(vlm: VLM, answers: Sequence[str]) -> tuple[Tensor, Tensor] | None:
    """Return ids of the answers and where they are, padded on the right.

    An answer's tokens depend on what stands right before it, which is the same template after
    every prompt; where a token reaches from one into the other, there is nothing to share.
    """
    prompts, images = [_ANY_PROMPT] * len(answers), [()] * len(answers)
    encoded = encode(vlm, prompts, images, answers, padding_side="right")
    alone = encode(vlm, prompts[:1], images[:1]).inputs["input_ids"][0]
    ids, is_answer = encoded.inputs["input_ids"], encoded.spans.answer
    start = alone.shape[0]
    is_apart = bool((ids[:, :start] == alone).all()) and bool(is_answer[:, start].all())
    if not is_apart or bool(is_answer[:, :start].any()):
        return None
    length = int(is_answer.sum(dim=1).max())
    return ids[:, start : start + length], is_answer[:, start : start + length]


def _prefill(vlm: VLM, inputs: dict[str, Any], last_layer: int) -> DynamicCache:
    """Return keys and values of prompts, computed up to one layer."""
    cache = DynamicCache(config=vlm.model.config.get_text_config(decoder=True))

    def stop(_hidden: Tensor) -> None:
        raise AllSeenError

    handle = hook_place(vlm, "resid_out", last_layer, stop)
    try:
        vlm.model(**inputs, past_key_values=cache, use_cache=True)
    except AllSeenError:
        return cache
    finally:
        handle.remove()
    return cache
