"""Everything of the model before its decoder, run once for each distinct set of pictures."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from safebridge.data.sample import Sample, open_images
from safebridge.models.load import VLM
from safebridge.models.tokens import Encoded, encode

__all__ = ["Example", "Prepared", "encode_samples", "prepare_samples"]

_PREPARED_AT_ONCE = 16


@final
@dataclass(frozen=True)
class Example:
    """One sample as token ids, with everything of the model before the decoder done."""

    input_ids: Tensor
    labels: Tensor
    is_image: Tensor
    picture: Hashable
    position_ids: Tensor | None


@final
@dataclass(frozen=True)
class Prepared:
    """All samples, and the image features of each distinct set of pictures."""

    examples: list[Example]
    features: dict[Hashable, Tensor]


class _ReachedDecoder(Exception):  # noqa: N818 - it carries a result, it is no error
    """Stops a forward pass at the decoder and carries the decoder's arguments out."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self.arguments = arguments


@contextmanager
def _stop_at(decoder: nn.Module) -> Iterator[None]:
    def stop(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        raise _ReachedDecoder(kwargs)

    handle = decoder.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def prepare_samples(vlm: VLM, samples: Sequence[Sample]) -> Prepared | None:
    """Run everything before the decoder once for each distinct set of pictures.

    Returns:
        None if the decoder takes more than embeddings, a mask and positions.
    """
    examples: dict[int, Example] = {}
    features: dict[Hashable, Tensor] = {}
    first = {_picture_key(vlm, sample): i for i, sample in reversed(list(enumerate(samples)))}
    leaders = sorted(first.values())
    others = sorted(set(range(len(samples))) - set(leaders))
    is_run_needed = True
    for indices, is_leading in ((leaders, True), (others, False)):
        for chunk in _chunks(samples, indices):
            chosen = [samples[index] for index in chunk]
            encoded = encode_samples(vlm, chosen, padding_side="right")
            arguments: Mapping[str, Any] | None = None
            if is_leading or is_run_needed:
                arguments = _decoder_arguments(vlm, encoded)
                if arguments is None:
                    return None
            positions = None if arguments is None else arguments.get("position_ids")
            for row, index in enumerate(chunk):
                example = _example(vlm, encoded, row, samples[index], positions)
                examples[index] = example
                if arguments is not None and example.picture not in features:
                    merged = arguments["inputs_embeds"][row]
                    features[example.picture] = merged[encoded.spans.image[row]].clone()
        # Positions that the model derives from its pictures have to be asked of every sample.
        is_run_needed = any(e.position_ids is not None for e in examples.values())
    return Prepared([examples[index] for index in range(len(samples))], features)


def _decoder_arguments(vlm: VLM, encoded: Encoded) -> Mapping[str, Any] | None:
    """Return what the decoder is called with, or None if it is more than plain embeddings."""
    try:
        with torch.no_grad(), _stop_at(vlm.layout.get(vlm.model, "language_model")):
            vlm.model(**encoded.inputs, use_cache=False)
    except _ReachedDecoder as reached:
        arguments = reached.arguments
    else:
        return None
    plain = {"inputs_embeds", "attention_mask", "position_ids"}
    extra = [v for name, v in arguments.items() if name not in plain and _holds_tensor(v)]
    merged, mask = arguments.get("inputs_embeds"), arguments.get("attention_mask")
    ids = encoded.inputs["input_ids"]
    is_plain_mask = mask is None or (isinstance(mask, Tensor) and mask.shape == ids.shape)
    if extra or not is_plain_mask or not isinstance(merged, Tensor):
        return None
    with torch.no_grad():
        is_text = ~encoded.spans.image & encoded.inputs["attention_mask"].bool()
        own = vlm.layout.get(vlm.model, "embed_tokens")(ids.masked_fill(~is_text, 0))
    return arguments if torch.equal(own[is_text], merged[is_text]) else None


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_holds_tensor(item) for item in value.values())
    if isinstance(value, list | tuple):
        return any(_holds_tensor(item) for item in value)
    return isinstance(value, Tensor)


def _example(
    vlm: VLM, encoded: Encoded, row: int, sample: Sample, positions: Tensor | None
) -> Example:
    assert encoded.labels is not None  # noqa: S101 - answers were given
    is_real = encoded.inputs["attention_mask"][row].bool()
    if positions is not None:  # one row of positions may stand for all
        positions = positions.expand(*positions.shape[:-2], *encoded.labels.shape)
    return Example(
        input_ids=encoded.inputs["input_ids"][row][is_real].cpu(),
        labels=encoded.labels[row][is_real].cpu(),
        is_image=encoded.spans.image[row][is_real].cpu(),
        picture=_picture_key(vlm, sample),
        position_ids=None if positions is None else positions[..., row, is_real].cpu(),
    )


def _picture_key(vlm: VLM, sample: Sample) -> Hashable:
    """Name a sample's image features; a Q-Former makes them depend on the prompt, too."""
    prompt = sample.prompt if vlm.layout.family == "instructblip" else ""
    return (sample.images, prompt)


def _chunks(samples: Sequence[Sample], indices: Sequence[int]) -> Iterator[list[int]]:
    """Yield samples with equally many pictures together, those of similar length first."""
    groups: dict[int, list[int]] = {}
    for index in indices:
        groups.setdefault(len(samples[index].images), []).append(index)
    for group in groups.values():
        group.sort(key=lambda index: len(samples[index].prompt) + len(samples[index].answer or ""))
        for start in range(0, len(group), _PREPARED_AT_ONCE):
            yield group[start : start + _PREPARED_AT_ONCE]


def encode_samples(vlm: VLM, samples: Sequence[Sample], padding_side: Any) -> Encoded:
    return encode(
        vlm,
        [sample.prompt for sample in samples],
        [open_images(sample) for sample in samples],
        [sample.answer or "" for sample in samples],
        padding_side=padding_side,
    )
