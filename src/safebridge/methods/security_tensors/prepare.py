"""Everything of the model before its decoder, run once for each distinct set of pictures."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from safebridge.data.sample import Sample, open_images
from safebridge.methods.security_tensors.objective import keep_first_labels
from safebridge.models.load import VLM
from safebridge.models.tokens import IGNORED_LABEL, Encoded, encode

__all__ = [
    "Example",
    "Prepared",
    "encode_samples",
    "find_picture_key",
    "prepare_samples",
    "run_to_decoder",
]

_PREPARED_AT_ONCE = 16


@final
@dataclass(frozen=True)
class Example:
    """One sample as token ids, with everything of the model before the decoder done."""

    input_ids: Tensor
    """Ids of prompt and answer, without padding."""

    labels: Tensor
    """The ids at the answer and -100 elsewhere."""

    is_image: Tensor
    """True at image tokens."""

    picture: Hashable
    """Key of the image features."""

    position_ids: Tensor | None
    """Positions [..., seq], or None if they count from zero."""


@final
@dataclass(frozen=True)
class Prepared:
    """All samples, and the image features of each distinct set of pictures."""

    examples: list[Example]
    """In the order of the samples."""

    features: dict[Hashable, Tensor]
    """Rows of the undefended decoder's input at the image tokens, by key."""

    leaders: dict[Hashable, int]
    """A sample that shows these pictures, by key."""


def prepare_samples(
    vlm: VLM, samples: Sequence[Sample], *, max_answer_tokens: int = 0
) -> Prepared | None:
    """Run everything before the decoder once for each distinct set of pictures.

    Args:
        vlm: The model; it is stopped as soon as it calls its decoder.
        samples: Samples with answers.
        max_answer_tokens: Answer tokens that keep their label, the later ones are cut off;
            0 keeps all.

    Returns:
        The samples as ids with their image features on the side, or None if the decoder
        takes more than embeddings, a mask and positions.
    """
    examples: dict[int, Example] = {}
    features: dict[Hashable, Tensor] = {}
    first = {find_picture_key(vlm, sample): i for i, sample in reversed(list(enumerate(samples)))}
    leaders = sorted(first.values())
    others = sorted(set(range(len(samples))) - set(leaders))
    is_run_needed = True
    for chunk in [*_chunks(samples, leaders), None, *_chunks(samples, others)]:
        if chunk is None:
            # Positions that follow from the pictures have to be asked of every sample.
            is_run_needed = any(e.position_ids is not None for e in examples.values())
            continue
        encoded = encode_samples(vlm, [samples[i] for i in chunk], padding_side="right")
        arguments = _decoder_arguments(vlm, encoded) if is_run_needed else {}
        if arguments is None:
            return None
        for row, index in enumerate(chunk):
            picture = find_picture_key(vlm, samples[index])
            positions = arguments.get("position_ids")
            examples[index] = _example(encoded, row, picture, positions, max_answer_tokens)
            if picture not in features:
                merged = arguments["inputs_embeds"][row]
                features[picture] = merged[encoded.spans.image[row]].clone()
    return Prepared([examples[index] for index in range(len(samples))], features, first)


def encode_samples(
    vlm: VLM, samples: Sequence[Sample], padding_side: Literal["left", "right"]
) -> Encoded:
    """Open the pictures of samples and encode them with their answers.

    Args:
        vlm: The model to encode for.
        samples: Samples with answers and equally many pictures.
        padding_side: "left" or "right".

    Raises:
        DataError: If a picture cannot be opened.
    """
    return encode(
        vlm,
        [sample.prompt for sample in samples],
        [open_images(sample) for sample in samples],
        [sample.answer or "" for sample in samples],
        padding_side=padding_side,
    )


def find_picture_key(vlm: VLM, sample: Sample) -> Hashable:
    """Name a sample's image features; a Q-Former makes them depend on the prompt, too.

    Args:
        vlm: The model.
        sample: Any sample.
    """
    prompt = sample.prompt if vlm.layout.family == "instructblip" else ""
    return (sample.images, prompt)


def run_to_decoder(vlm: VLM, inputs: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Run a model until it calls its decoder.

    Args:
        vlm: The model; it is stopped there.
        inputs: Its keyword arguments.

    Returns:
        What the decoder is called with, or None if it is not called by name.
    """
    try:
        with _stop_at(vlm.layout.get(vlm.model, "language_model")):
            vlm.model(**inputs, use_cache=False)
    except _ReachedDecoder as reached:
        return reached.arguments
    return None


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


def _decoder_arguments(vlm: VLM, encoded: Encoded) -> Mapping[str, Any] | None:
    """Return what the decoder is called with, or None if it is more than plain embeddings."""
    with torch.no_grad():
        arguments = run_to_decoder(vlm, encoded.inputs)
    if arguments is None:
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
    # A model that scales or shifts its embeddings on the way is not what we would rebuild.
    return arguments if torch.equal(own[is_text], merged[is_text]) else None


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_holds_tensor(item) for item in value.values())
    if isinstance(value, list | tuple):
        return any(_holds_tensor(item) for item in value)
    return isinstance(value, Tensor)


def _example(
    encoded: Encoded, row: int, picture: Hashable, positions: Tensor | None, count: int
) -> Example:
    assert encoded.labels is not None  # noqa: S101 - answers were given
    labels = keep_first_labels(encoded.labels, count)
    is_real = encoded.inputs["attention_mask"][row].bool().clone()
    if count:  # nothing after the last label is computed
        is_real[int(labels[row].ne(IGNORED_LABEL).nonzero().max()) + 1 :] = False
    if positions is not None:  # one row of positions may stand for all
        positions = positions.expand(*positions.shape[:-2], *encoded.labels.shape)
    return Example(
        input_ids=encoded.inputs["input_ids"][row][is_real].cpu(),
        labels=labels[row][is_real].cpu(),
        is_image=encoded.spans.image[row][is_real].cpu(),
        picture=picture,
        position_ids=None if positions is None else positions[..., row, is_real].cpu(),
    )


def _chunks(samples: Sequence[Sample], indices: Sequence[int]) -> Iterator[list[int]]:
    """Yield samples with equally many pictures together, those of similar length first."""
    groups: dict[int, list[int]] = {}
    for index in indices:
        groups.setdefault(len(samples[index].images), []).append(index)
    for group in groups.values():
        group.sort(key=lambda index: len(samples[index].prompt) + len(samples[index].answer or ""))
        for start in range(0, len(group), _PREPARED_AT_ONCE):
            yield group[start : start + _PREPARED_AT_ONCE]
