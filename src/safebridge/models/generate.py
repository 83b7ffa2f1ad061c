"""Greedy answers for many prompts: sorted into batches, returned in the given order."""

from collections.abc import Callable, Sequence

import torch
from PIL import Image

from safebridge.errors import DataError
from safebridge.models.load import VLM
from safebridge.models.tokens import Encoded, encode, find_stop_token_ids

__all__ = ["answer_encoded", "generate_answers"]


def generate_answers(
    vlm: VLM,
    prompts: Sequence[str],
    images: Sequence[Sequence[Image.Image]],
    *,
    max_new_tokens: int = 24,
    batch_size: int = 16,
    progress: Callable[[int], object] | None = None,
    prefixes: Sequence[str] | None = None,
    prefix_format: str = "{}",
) -> list[str]:
    """Answer every prompt greedily.

    Rows of similar length share a batch, and rows with and without images do not, so
    little work goes into padding. An answer ends at the stop tokens of the model's
    generation config, at the chat template's end of turn, or after `max_new_tokens`.
    A defense that is applied to the model stays in force.

    Args:
        vlm: The model that answers.
        prompts: What the user says, one for each answer.
        images: The pictures of each prompt, none to many.
        max_new_tokens: Longest answer in tokens.
        batch_size: Rows that are answered together; more is faster and takes more memory.
        progress: Called after each batch with the number of answers it brought.
        prefixes: Text before the images of each prompt, as in `encode`.
        prefix_format: How a prefix is written, as in `encode`.

    Returns:
        The answers alone, in the order of the prompts, without special tokens and
        without white space around them.

    Raises:
        DataError: If the lists differ in length, or a number is not positive.
        ShapeError: If the image positions do not match the images.
    """
    if len(prompts) != len(images):
        raise DataError(
            f"{len(prompts)} prompts but {len(images)} lists of images. Pass one list for each "
            "prompt, empty for a prompt without images."
        )
    if prefixes is not None and len(prefixes) != len(prompts):
        raise DataError(
            f"{len(prompts)} prompts but {len(prefixes)} prefixes. Pass one for each, empty for "
            "none."
        )
    if batch_size < 1 or max_new_tokens < 1:
        raise DataError("batch_size and max_new_tokens must be 1 or more.")
    answers = [""] * len(prompts)
    for rows in _batches(prompts, images, batch_size):
        encoded = encode(
            vlm,
            [prompts[i] for i in rows],
            [images[i] for i in rows],
            padding_side="left",
            prefixes=None if prefixes is None else [prefixes[i] for i in rows],
            prefix_format=prefix_format,
        )
        batch = answer_encoded(vlm, encoded, max_new_tokens)
        for row, answer in zip(rows, batch, strict=True):
            answers[row] = answer
        if progress is not None:
            progress(len(rows))
    return answers


def _batches(
    prompts: Sequence[str], images: Sequence[Sequence[Image.Image]], batch_size: int
) -> list[list[int]]:
    """Return row numbers in batches of one image count, longest prompts first.

    The longest come first so that a batch that does not fit into memory fails at once.
    """
    groups: dict[int, list[int]] = {}
    for row, own in enumerate(images):
        groups.setdefault(len(own), []).append(row)
    batches = []
    for _, rows in sorted(groups.items(), reverse=True):
        rows.sort(key=lambda row: len(prompts[row]), reverse=True)
        batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    return batches


@torch.inference_mode()
def answer_encoded(vlm: VLM, encoded: Encoded, max_new_tokens: int) -> list[str]:
    """Answer one batch that is encoded already, greedily.

    Args:
        vlm: The model.
        encoded: The batch, padded on the left.
        max_new_tokens: Longest answer in tokens.

    Returns:
        The answers, without special tokens and surrounding white space.
    """
    width = encoded.inputs["input_ids"].shape[1]
    stops, pad = find_stop_token_ids(vlm), vlm.tokenizer.pad_token_id
    tokens = vlm.model.generate(
        **encoded.inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        eos_token_id=stops,
        pad_token_id=stops[0] if pad is None else pad,
    )
    texts = vlm.tokenizer.batch_decode(tokens[:, width:], skip_special_tokens=True)
    return [text.strip() for text in texts]
