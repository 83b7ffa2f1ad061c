"""From prompts and images to model inputs, with spans and labels of one tokenisation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, final

import numpy as np
import torch
from jaxtyping import Bool, Int
from jinja2.exceptions import TemplateError
from PIL import Image
from torch import Tensor

from safebridge.errors import DataError, SafebridgeError, ShapeError
from safebridge.models.load import VLM

__all__ = [
    "IGNORED_LABEL",
    "Encoded",
    "TokenSpans",
    "encode",
    "find_end_of_turn",
    "find_stop_token_ids",
]

IGNORED_LABEL: Final = -100
"""Label of positions that do not count in the loss."""

_MARK: Final = "Umbrella"


@final
@dataclass(frozen=True, eq=False)
class TokenSpans:
    """Which positions of a batch hold the prefix, the image, the prompt's own text, the answer.

    They never overlap. What is in none of them is padding or belongs to the chat
    template (turn markers, system text, the row ends of an image).
    """

    image: Bool[Tensor, "batch seq"]
    """True at image tokens, the positions that image features are written to."""

    text: Bool[Tensor, "batch seq"]
    """True at the tokens of the prompt as the caller gave it."""

    answer: Bool[Tensor, "batch seq"]
    """True at the tokens of the answer, its end-of-turn token included."""

    prefix: Bool[Tensor, "batch seq"]
    """True at the tokens of the text before the images, its format left out."""


@final
@dataclass(frozen=True, eq=False)
class Encoded:
    """One batch, ready for the model it was encoded for."""

    inputs: dict[str, Tensor]
    """Keyword arguments for `vlm.model(...)` and `vlm.model.generate(...)`, on its device."""

    spans: TokenSpans
    """Where image, text and answer are."""

    labels: Int[Tensor, "batch seq"] | None
    """`input_ids` at the answer and -100 elsewhere; None without answers."""


def encode(
    vlm: VLM,
    prompts: Sequence[str],
    images: Sequence[Sequence[Image.Image]],
    answers: Sequence[str] | None = None,
    *,
    padding_side: Literal["left", "right"] = "left",
    prefixes: Sequence[str] | None = None,
    prefix_format: str = "{}",
) -> Encoded:
    """Encode one user turn for each prompt, with its images before the text.

    The processor's chat template writes the turn and opens the answer. Given answers are
    appended to that text with the end-of-turn token, and the whole is tokenised once, so
    that labels and inputs cannot disagree. A token that begins in the template and ends
    in the answer counts as answer.

    Without a chat template the turn takes its family's published plain form: PaliGemma's
    is the images, the prompt and a newline, InstructBLIP's the prompt alone, which its
    Q-Former reads as well.

    Args:
        vlm: The model to encode for.
        prompts: What the user says, one for each row. Not changed.
        images: The pictures of each row, none to many; converted to RGB copies.
        answers: What the model should say, one for each row; None for generation.
        padding_side: "left" for generation, "right" for training.
        prefixes: Text that stands before the images of each row, e.g. a retrieved description;
            an empty one writes nothing. It needs a chat template.
        prefix_format: How a prefix is written, with {} at its place, e.g. "Note: {}. ".

    Returns:
        Inputs on the model's device, spans, and labels.

    Raises:
        DataError: If the lists differ in length or are empty, an answer is empty, or a
            prompt or prefix contains the model's image placeholder.
        ShapeError: If the image positions do not match the images.
    """
    _check_lists(prompts, images, answers)
    written = _Prefixes(_check_prefixes(vlm, prompts, prefixes), prefix_format)
    rows = _render_rows(vlm, prompts, images, answers, written)
    _check_image_counts(vlm, images)
    rgb = [[picture.convert("RGB") for picture in own] for own in images]
    features = _process(vlm, rows, rgb, padding_side)
    spans = _find_spans(vlm, features, features.pop("offset_mapping"), rows)
    _check_spans(spans, images, answers)
    labels = None
    if answers is not None:
        labels = features["input_ids"].masked_fill(~spans.answer, IGNORED_LABEL)
    return _on_device(vlm, Encoded(inputs=features, spans=spans, labels=labels))


def find_end_of_turn(vlm: VLM) -> str:
    """Return the token that ends an answer in the model's chat template.

    Args:
        vlm: The model with its processor.

    Returns:
        The first special token that the template writes after an answer, e.g.
        "<|im_end|>"; the tokenizer's end-of-sequence token if it writes none.

    Raises:
        DataError: If there is neither.
    """
    tokenizer = vlm.tokenizer
    if _chat_template(vlm):
        turns = [_turn("user", _MARK, 0), _turn("assistant", _MARK, 0)]
        try:
            text = vlm.processor.apply_chat_template(turns, tokenize=False)
        except TemplateError:
            text = ""  # the template writes user turns only
        ids = tokenizer(text.rpartition(_MARK)[2], add_special_tokens=False)["input_ids"]
        special = {*tokenizer.all_special_ids, *_generation_stops(vlm)}
        ending = [token for token in ids if token in special]
        if _MARK in text and ending:
            return str(tokenizer.convert_ids_to_tokens(ending[0]))
    if tokenizer.eos_token is None:
        raise DataError(
            f"the tokenizer of '{vlm.name}' has no end-of-sequence token, so an answer cannot end. "
            "Set vlm.tokenizer.eos_token."
        )
    return str(tokenizer.eos_token)


def find_stop_token_ids(vlm: VLM) -> list[int]:
    """Return the tokens at which generation stops.

    Args:
        vlm: The model with its processor.

    Returns:
        Those of the model's generation config, and the end-of-turn token.
    """
    end = vlm.tokenizer.convert_tokens_to_ids(find_end_of_turn(vlm))
    return sorted({*_generation_stops(vlm), int(end)})


@dataclass(frozen=True)
class _Row:
    """One row's text, and where its prompt and answer lie, counted from the text's end.

    A prefix is counted from the text's start, because the images come between.
    """

    text: str
    answer: str
    prompt_start: int
    prompt_end: int
    answer_start: int
    prefix_start: int = 0
    prefix_end: int = 0


@dataclass(frozen=True)
class _Prefixes:
    """The text before the images of each row, and how it is written."""

    texts: Sequence[str]
    form: str

    def insert(self, number: int, place: int, text: str) -> tuple[str, int, int]:
        """Return a row's text with its prefix, and where the prefix starts and ends."""
        prefix = self.texts[number]
        if not prefix:
            return text, 0, 0
        before, _, after = self.form.partition("{}")
        start = place + len(before)
        longer = f"{text[:place]}{before}{prefix}{after}{text[place:]}"
        return longer, start, start + len(prefix)


def _render_rows(
    vlm: VLM,
    prompts: Sequence[str],
    images: Sequence[Sequence[Image.Image]],
    answers: Sequence[str] | None,
    prefixes: _Prefixes,
) -> list[_Row]:
    """Write every row's text."""
    end = find_end_of_turn(vlm) if answers is not None else ""
    after_prompt = _render_after(vlm)
    place = _find_image_place(vlm) if any(prefixes.texts) else 0
    given = [""] * len(prompts) if answers is None else answers
    rows = []
    for number, (prompt, own, answer) in enumerate(zip(prompts, images, given, strict=True)):
        text, start, stop = prefixes.insert(number, place, _render(vlm, prompt, len(own)))
        _check_placeholders(vlm, number, text, len(own))
        tail = "" if not answer else _answer_text(vlm, answer) + end
        row = _find_places(vlm, number, prompt, text, after_prompt=after_prompt, tail=tail)
        rows.append(replace(row, prefix_start=start, prefix_end=stop))
    return rows


def _find_image_place(vlm: VLM) -> int:
    """Return where a turn's images begin: where turns with and without one part ways."""
    pairs = enumerate(zip(_render(vlm, _MARK, 1), _render(vlm, _MARK, 0), strict=False))
    return next((place for place, (shown, plain) in pairs if shown != plain), 0)


def _render(vlm: VLM, prompt: str, num_images: int) -> str:
    """Write one user turn and open the answer."""
    if _chat_template(vlm):
        turns = [_turn("user", prompt, num_images)]
        return str(
            vlm.processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        )
    if vlm.layout.family == "paligemma":
        return _placeholder(vlm) * num_images + prompt
    if vlm.layout.family == "instructblip":
        return prompt
    raise DataError(
        f"the processor of '{vlm.name}' has no chat template. Set vlm.processor.chat_template to "
        "the one its model card gives."
    )


def _render_after(vlm: VLM) -> str:
    """Return what the template writes after a prompt."""
    if not _chat_template(vlm):
        return ""
    return _render(vlm, _MARK, 0).rpartition(_MARK)[2]


def _find_places(
    vlm: VLM, number: int, prompt: str, text: str, *, after_prompt: str, tail: str
) -> _Row:
    """Find the prompt in its text; templates may trim it, never rewrite it."""
    core = prompt.strip()
    body = text.removesuffix(after_prompt)
    start = body.rfind(core)
    if start >= 0 and _placeholder(vlm) and _placeholder(vlm) in text[start:]:
        raise DataError(
            f"the chat template of '{vlm.name}' writes images after the prompt. Use one that "
            "writes them first, as the content lists them."
        )
    if start < 0 or body[start + len(core) :].strip():
        raise DataError(
            f"prompt {number} does not appear in what the chat template of '{vlm.name}' made of "
            "it, so its tokens cannot be told apart. Use a template that writes the prompt as it "
            "is."
        )
    after = len(text) - start - len(core)
    if vlm.layout.family == "paligemma":  # the answer is a second text there
        return _Row(text, tail, after + len(core) + 1, after + 1, 0)
    after += len(tail)
    return _Row(text + tail, tail, after + len(core), after, len(tail))


def _answer_text(vlm: VLM, answer: str) -> str:
    """Return the answer as it follows its prompt."""
    return f" {answer}" if vlm.layout.family == "instructblip" else answer


def _turn(role: str, text: str, num_images: int) -> dict[str, Any]:
    """Return one message in the form chat templates take."""
    content: list[dict[str, str]] = [{"type": "image"} for _ in range(num_images)]
    return {"role": role, "content": [*content, {"type": "text", "text": text}]}


def _chat_template(vlm: VLM) -> Any:
    """Return the chat template, which older checkpoints keep with the tokenizer."""
    own = getattr(vlm.processor, "chat_template", None)
    return own or getattr(vlm.tokenizer, "chat_template", None)


def _placeholder(vlm: VLM) -> str:
    """Return what stands for one image in a text."""
    token = getattr(vlm.processor, "image_token", "")
    return str(getattr(token, "content", token) or "")


def _generation_stops(vlm: VLM) -> list[int]:
    """Return the stop tokens of the model's generation config."""
    config = getattr(vlm.model, "generation_config", None)
    stops = getattr(config, "eos_token_id", None)
    if stops is None:
        return []
    return [int(stop) for stop in stops] if isinstance(stops, list | tuple) else [int(stops)]


def _process(
    vlm: VLM, rows: Sequence[_Row], images: list[list[Image.Image]], padding_side: str
) -> dict[str, Tensor]:
    """Tokenise the texts and preprocess the pictures."""
    texts = [row.text for row in rows]
    bos = vlm.tokenizer.bos_token
    options: dict[str, Any] = {
        "padding": True,
        "padding_side": padding_side,
        "return_tensors": "pt",
        "return_offsets_mapping": True,
        "add_special_tokens": not (bos and texts[0].startswith(bos)),
    }
    if not vlm.tokenizer.is_fast:
        raise DataError(
            f"the tokenizer of '{vlm.name}' gives no character offsets, so spans and labels cannot "
            "be found. Load a checkpoint that has a tokenizer.json."
        )
    try:
        if vlm.layout.family == "paligemma":
            return _process_paligemma(vlm, rows, images, options)
        if vlm.layout.family == "instructblip":
            return _process_instructblip(vlm, rows, images, options)
        pictures = images if any(images) else None
        return dict(vlm.processor(text=texts, images=pictures, **options))
    except SafebridgeError:
        raise
    except (ValueError, IndexError) as error:
        raise DataError(
            f"the processor of '{vlm.name}' refused the batch: {error} Rows with different numbers "
            "of images may have to be encoded apart."
        ) from error


def _process_paligemma(
    vlm: VLM,
    rows: Sequence[_Row],
    images: list[list[Image.Image]],
    options: Mapping[str, Any],
) -> dict[str, Tensor]:
    """Pass PaliGemma's answers as suffixes, so that they are attended to causally."""
    suffix = [row.answer.removesuffix(vlm.tokenizer.eos_token) for row in rows]
    texts = [row.text for row in rows]
    if any(images):
        pair = {"suffix": suffix} if any(suffix) else {}
        lists = {**options, "return_tensors": None}  # its way to labels warns about tensors
        written = vlm.processor(text=texts, images=images, **pair, **lists)
        features = {name: torch.from_numpy(np.array(value)) for name, value in written.items()}
    else:  # the processor insists on images; this is the text it would write without
        texts = [f"{vlm.tokenizer.bos_token}{text}\n" for text in texts]
        pairs = [row.answer for row in rows] if any(suffix) else None
        features = dict(vlm.tokenizer(texts, pairs, return_token_type_ids=True, **options))
    features.pop("labels", None)
    return features


def _process_instructblip(
    vlm: VLM,
    rows: Sequence[_Row],
    images: list[list[Image.Image]],
    options: Mapping[str, Any],
) -> dict[str, Tensor]:
    """Write InstructBLIP's query positions before the text, and its prompt to the Q-Former.

    The processor would put padding between the two and show the answer to the Q-Former.
    """
    tokenizer, processor = vlm.tokenizer, vlm.processor
    queries = _placeholder(vlm) * processor.num_query_tokens
    query_ids = tokenizer(queries, add_special_tokens=False)["input_ids"]
    plain = {"return_offsets_mapping": True, "return_token_type_ids": False}
    written = tokenizer([row.text for row in rows], **plain)
    ids = [query_ids + own for own in written["input_ids"]]
    offsets = [[(0, 0)] * len(query_ids) + own for own in written["offset_mapping"]]
    padded = tokenizer.pad(
        {"input_ids": ids}, padding_side=options["padding_side"], return_tensors="pt"
    )
    width = padded["input_ids"].shape[1]
    is_left = options["padding_side"] == "left"
    gaps = [[(0, 0)] * (width - len(own)) for own in offsets]
    full = [gap + own if is_left else own + gap for gap, own in zip(gaps, offsets, strict=True)]
    prompts = [row.text.removesuffix(row.answer) for row in rows]
    asked = processor.qformer_tokenizer(prompts, padding=True, return_tensors="pt")
    pictures = processor.image_processor([own[0] for own in images], return_tensors="pt")
    return {
        "input_ids": padded["input_ids"],
        "attention_mask": padded["attention_mask"],
        "offset_mapping": torch.tensor(full),
        "pixel_values": pictures["pixel_values"],
        "qformer_input_ids": asked["input_ids"],
        "qformer_attention_mask": asked["attention_mask"],
    }


def _find_spans(
    vlm: VLM, features: Mapping[str, Tensor], offsets: Tensor, rows: Sequence[_Row]
) -> TokenSpans:
    """Turn the places in the texts into masks over tokens."""
    input_ids = features["input_ids"]
    starts, ends = offsets.unbind(-1)
    is_written = features["attention_mask"].bool() & (ends > starts)
    is_second = torch.zeros_like(is_written)
    if vlm.layout.family == "paligemma":
        is_second = features["token_type_ids"].bool()
    is_first = is_written & ~is_second
    length = (ends * is_first).amax(dim=1, keepdim=True)

    def place(field: str) -> Tensor:
        return torch.tensor([[getattr(row, field)] for row in rows])

    def before_end(field: str) -> Tensor:
        return length - place(field)

    image = (input_ids == vlm.layout.image_token_id) & features["attention_mask"].bool()
    answer = (is_first & (ends > before_end("answer_start"))) | (is_written & is_second)
    text = is_first & (ends > before_end("prompt_start")) & (starts < before_end("prompt_end"))
    prefix = is_first & (ends > place("prefix_start")) & (starts < place("prefix_end"))
    prefix = prefix & ~image
    return TokenSpans(
        image=image, text=text & ~image & ~answer & ~prefix, answer=answer, prefix=prefix
    )


def _check_lists(
    prompts: Sequence[str],
    images: Sequence[Sequence[Image.Image]],
    answers: Sequence[str] | None,
) -> None:
    """Refuse lists that do not belong together."""
    if not prompts:
        raise DataError("no prompts to encode. Pass at least one.")
    if len(images) != len(prompts):
        raise DataError(
            f"{len(prompts)} prompts but {len(images)} lists of images. Pass one list for each "
            "prompt, empty for a prompt without images."
        )
    if answers is None:
        return
    if len(answers) != len(prompts):
        raise DataError(f"{len(prompts)} prompts but {len(answers)} answers. Pass one for each.")
    empty = [number for number, answer in enumerate(answers) if not answer.strip()]
    if empty:
        raise DataError(
            f"answer {empty[0]} is empty, so there is nothing to learn from it. Leave that sample "
            "out, or pass answers=None to generate."
        )


def _check_prefixes(
    vlm: VLM, prompts: Sequence[str], prefixes: Sequence[str] | None
) -> Sequence[str]:
    """Return one prefix for each prompt, refusing those that cannot be written."""
    if prefixes is None:
        return [""] * len(prompts)
    if len(prefixes) != len(prompts):
        raise DataError(
            f"{len(prompts)} prompts but {len(prefixes)} prefixes. Pass one for each, empty for "
            "none."
        )
    if any(prefixes) and not _chat_template(vlm):
        raise DataError(
            f"'{vlm.name}' has no chat template, and its plain form has no place for text before "
            "the images. Write that text into the prompt instead."
        )
    return prefixes


def _check_image_counts(vlm: VLM, images: Sequence[Sequence[Image.Image]]) -> None:
    """Refuse batches in which one row's images would change what another row means."""
    counts = {len(own) for own in images}
    family = vlm.layout.family
    if family == "instructblip" and counts != {1}:
        raise DataError(
            "InstructBLIP answers about exactly one image. Pass one for each prompt, or use "
            "another model for text alone."
        )
    # Mllama's rows attend to the slots of the batch's longest row before their own image;
    # PaliGemma's processor puts the start token elsewhere in rows without an image.
    is_apart = counts != {0} and 0 in counts if family == "paligemma" else len(counts) > 1
    if family in {"mllama", "paligemma"} and is_apart:
        raise DataError(
            f"a batch for '{vlm.name}' has rows with {sorted(counts)} images, which would change "
            "each other. Encode rows with the same number of images together."
        )


def _check_placeholders(vlm: VLM, number: int, text: str, num_images: int) -> None:
    """Refuse a text whose placeholders are not those of its images."""
    placeholder = _placeholder(vlm)
    # InstructBLIP's processor writes its image positions without a placeholder.
    is_written = placeholder and vlm.layout.family != "instructblip"
    expected = num_images if is_written else 0
    found = text.count(placeholder) if placeholder else 0
    if found != expected:
        raise DataError(
            f"prompt {number} comes with {num_images} images, but its text has {found} image "
            f"placeholders '{placeholder}'. Remove '{placeholder}' from the prompt; if it is not "
            f"there, the chat template of '{vlm.name}' does not write images."
        )


def _check_spans(
    spans: TokenSpans,
    images: Sequence[Sequence[Image.Image]],
    answers: Sequence[str] | None,
) -> None:
    """Refuse a batch whose image or answer positions are not those that were asked for."""
    counts = spans.image.sum(dim=1).tolist()
    for number, (count, own) in enumerate(zip(counts, images, strict=True)):
        if count < len(own) or (count > 0 and not own):
            raise ShapeError(
                f"row {number} has {count} image positions for {len(own)} images. The processor "
                "and the model disagree about the image token; load both from the same checkpoint, "
                "or pass layout=VLMLayout(image_token_id=..., ...)."
            )
    if answers is not None and not bool(spans.answer.any(dim=1).all()):
        raise DataError("an answer has no tokens. Pass answers with text that the tokenizer knows.")


def _on_device(vlm: VLM, encoded: Encoded) -> Encoded:
    """Move a batch to where the model's inputs go, pictures in the model's type."""
    device = vlm.device

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, vlm.dtype if tensor.is_floating_point() else None)

    spans = encoded.spans
    return Encoded(
        inputs={name: move(tensor) for name, tensor in encoded.inputs.items()},
        spans=TokenSpans(
            image=spans.image.to(device),
            text=spans.text.to(device),
            answer=spans.answer.to(device),
            prefix=spans.prefix.to(device),
        ),
        labels=None if encoded.labels is None else encoded.labels.to(device),
    )
