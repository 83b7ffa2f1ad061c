"""Encoding: spans and labels of one tokenisation, padding, and what is refused."""

from collections.abc import Callable

import pytest
import torch
from PIL import Image

from safebridge.errors import DataError, ShapeError
from safebridge.models.layout import VLMLayout
from safebridge.models.load import VLM, load_vlm
from safebridge.models.tokens import (
    IGNORED_LABEL,
    Encoded,
    encode,
    find_end_of_turn,
    find_stop_token_ids,
)
from safebridge.testing.tiny import TINY_FAMILIES, tiny_vlm

PROMPTS = ["What is this?", "How do I make\nthis at home? Ünïcode ✂️"]
ANSWERS = ["A cat, I think.", "Nö."]
MakePicture = Callable[..., Image.Image]


@pytest.fixture(params=sorted(TINY_FAMILIES))
def vlm(request: pytest.FixtureRequest) -> VLM:
    return tiny_vlm(request.param)


@pytest.fixture(scope="module")
def llava() -> VLM:
    return tiny_vlm("llava")


@pytest.fixture
def pictures(make_picture: MakePicture) -> list[list[Image.Image]]:
    return [[make_picture(0)], [make_picture(1, size=(33, 64))]]


def decode(vlm: VLM, encoded: Encoded, span: torch.Tensor, row: int) -> str:
    return vlm.tokenizer.decode(encoded.inputs["input_ids"][row][span[row]])


@pytest.mark.parametrize("side", ["left", "right"])
def test_spans_hold_the_prompt_and_the_answer_to_the_letter(
    vlm: VLM, pictures: list[list[Image.Image]], side: str
) -> None:
    encoded = encode(vlm, PROMPTS, pictures, ANSWERS, padding_side=side)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        assert decode(vlm, encoded, encoded.spans.text, row) == prompt
        said = decode(vlm, encoded, encoded.spans.answer, row)
        assert said.lstrip() == answer + vlm.tokenizer.eos_token


def test_spans_do_not_overlap_and_leave_padding_out(
    vlm: VLM, pictures: list[list[Image.Image]]
) -> None:
    encoded = encode(vlm, PROMPTS, pictures, ANSWERS)
    spans = encoded.spans
    total = spans.image.int() + spans.text.int() + spans.answer.int()
    assert int(total.max()) == 1
    assert not bool((total.bool() & (encoded.inputs["attention_mask"] == 0)).any())


def test_image_span_is_where_the_model_writes_image_features(
    vlm: VLM, pictures: list[list[Image.Image]]
) -> None:
    encoded = encode(vlm, PROMPTS, pictures)
    is_image = encoded.inputs["input_ids"] == vlm.layout.image_token_id
    assert torch.equal(encoded.spans.image, is_image)
    assert bool(is_image.any(dim=1).all())
    with torch.no_grad():
        vlm.model(**encoded.inputs)  # raises if features and positions do not match


def test_labels_are_the_answer_and_nothing_else(
    vlm: VLM, pictures: list[list[Image.Image]]
) -> None:
    encoded = encode(vlm, PROMPTS, pictures, ANSWERS, padding_side="right")
    is_labelled = encoded.labels != IGNORED_LABEL
    assert torch.equal(is_labelled, encoded.spans.answer)
    assert torch.equal(encoded.labels[is_labelled], encoded.inputs["input_ids"][is_labelled])
    ends = [row[row != IGNORED_LABEL][-1].item() for row in encoded.labels]
    assert ends == [vlm.tokenizer.eos_token_id] * 2


def test_inputs_before_the_answer_are_those_of_generation(
    vlm: VLM, pictures: list[list[Image.Image]]
) -> None:
    asked = encode(vlm, PROMPTS[:1], pictures[:1])
    told = encode(vlm, PROMPTS[:1], pictures[:1], ANSWERS[:1])
    length = asked.inputs["input_ids"].shape[1]
    assert asked.labels is None
    assert not bool(asked.spans.answer.any())
    for name, value in asked.inputs.items():
        other = told.inputs[name]
        if value.shape != other.shape:  # one value for each position
            other = other[:, :length]
        assert torch.equal(value, other)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_equals_its_rows(
    vlm: VLM, pictures: list[list[Image.Image]], side: str
) -> None:
    batch = encode(vlm, PROMPTS, pictures, ANSWERS, padding_side=side)
    logits = vlm.model(**batch.inputs).logits
    for row in range(2):
        alone = encode(vlm, [PROMPTS[row]], [pictures[row]], [ANSWERS[row]])
        expected = vlm.model(**alone.inputs).logits[0]
        found = logits[row][batch.inputs["attention_mask"][row].bool()]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", sorted(set(TINY_FAMILIES) - {"instructblip"}))
def test_rows_take_no_image_or_two(family: str, make_picture: MakePicture) -> None:
    vlm = tiny_vlm(family)
    one = encode(vlm, ["Hi"], [[make_picture(0)]]).spans.image.sum()
    two = encode(vlm, ["Hi"], [[make_picture(0), make_picture(1)]])
    none = encode(vlm, ["Hi"], [[]], ["Ho."])
    assert int(none.spans.image.sum()) == 0
    assert decode(vlm, none, none.spans.text, 0) == "Hi"
    assert decode(vlm, none, none.spans.answer, 0) == f"Ho.{vlm.tokenizer.eos_token}"
    # LLaVA-OneVision tiles a picture only where it is alone.
    assert family == "llava_onevision" or int(two.spans.image.sum()) == 2 * int(one)
    for encoded in (two, none):
        vlm.model(**encoded.inputs)


@torch.no_grad()
@pytest.mark.parametrize(
    "family", sorted(set(TINY_FAMILIES) - {"instructblip", "mllama", "paligemma"})
)
def test_rows_with_and_without_images_share_a_batch(family: str, make_picture: MakePicture) -> None:
    vlm = tiny_vlm(family)
    images = [[], [make_picture(0)]]
    logits = vlm.model(**encode(vlm, ["Hi", "What?"], images).inputs).logits
    for row, prompt in enumerate(["Hi", "What?"]):
        alone = vlm.model(**encode(vlm, [prompt], [images[row]]).inputs).logits[0]
        torch.testing.assert_close(logits[row, -len(alone) :], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["mllama", "paligemma"])
def test_batch_whose_rows_would_change_each_other_is_refused(
    family: str, make_picture: MakePicture
) -> None:
    with pytest.raises(DataError, match=r"rows with \[0, 1\] images.*same number of images"):
        encode(tiny_vlm(family), ["Hi", "Ho"], [[], [make_picture()]])


def test_instructblip_takes_exactly_one_image(make_picture: MakePicture) -> None:
    vlm = tiny_vlm("instructblip")
    for images in ([], [make_picture(), make_picture()]):
        with pytest.raises(DataError, match=r"exactly one image. Pass one for each prompt"):
            encode(vlm, ["Hi"], [images])


def test_instructblips_qformer_does_not_read_the_answer(make_picture: MakePicture) -> None:
    vlm = tiny_vlm("instructblip")
    encoded = encode(vlm, ["Hi"], [[make_picture()]], ["Ho."])
    assert vlm.processor.qformer_tokenizer.decode(encoded.inputs["qformer_input_ids"][0]) == "Hi"


def test_pictures_of_any_mode_become_rgb_and_stay_as_they_were(
    llava: VLM, make_picture: MakePicture
) -> None:
    gray = make_picture(mode="L")
    before = gray.tobytes()
    expected = encode(llava, ["Hi"], [[gray.convert("RGB")]]).inputs["pixel_values"]
    for picture in (gray, gray.convert("LA"), gray.convert("RGBA")):
        found = encode(llava, ["Hi"], [[picture]]).inputs["pixel_values"]
        assert torch.equal(found, expected)
    assert (gray.mode, gray.tobytes()) == ("L", before)


@pytest.mark.parametrize("prompt", ["user", "assistant", "s", "<"])
def test_prompt_that_the_template_contains_is_found_where_it_was_written(
    llava: VLM, prompt: str
) -> None:
    encoded = encode(llava, [prompt], [[]], ["Yes."])
    (positions,) = encoded.spans.text[0].nonzero(as_tuple=True)
    start = 1 + len("user\n")  # <|im_start|> is one token, every other character one more
    assert positions.tolist() == list(range(start, start + len(prompt)))


def test_template_that_writes_images_after_the_prompt_is_told(make_picture: MakePicture) -> None:
    vlm = tiny_vlm("llava")
    vlm.processor.chat_template = (
        "{% for message in messages %}{{ message['content'][-1]['text'] }}"
        "{% for part in message['content'][:-1] %}<image>{% endfor %}{% endfor %}"
    )
    with pytest.raises(DataError, match=r"writes images after the prompt. Use one that writes"):
        encode(vlm, ["Hi"], [[make_picture()]])


def test_pictures_follow_the_models_type(make_picture: MakePicture) -> None:
    vlm = load_vlm("tiny/llava", dtype="bfloat16")
    encoded = encode(vlm, ["Hi"], [[make_picture()]])
    assert encoded.inputs["pixel_values"].dtype == torch.bfloat16
    assert encoded.inputs["input_ids"].dtype == torch.long


def test_end_of_turn_is_what_the_template_writes_after_an_answer(llava: VLM) -> None:
    assert find_end_of_turn(llava) == "<|im_end|>"
    vlm = tiny_vlm("idefics3")
    vlm.processor.chat_template = vlm.processor.chat_template.replace(
        "<|im_end|>", "<end_of_utterance>"
    )
    end = vlm.tokenizer.convert_tokens_to_ids("<end_of_utterance>")
    assert find_end_of_turn(vlm) == "<end_of_utterance>"
    assert find_stop_token_ids(vlm) == sorted([end, vlm.tokenizer.eos_token_id])


def test_end_of_turn_is_the_end_of_sequence_where_the_template_writes_none() -> None:
    vlm = tiny_vlm("llava")
    vlm.processor.chat_template = (
        "{% for message in messages %}{{ message['role'] }}: "
        "{% for part in message['content'] %}{{ part['text'] }}{% endfor %} {% endfor %}"
    )
    assert find_end_of_turn(vlm) == vlm.tokenizer.eos_token


def test_lists_that_do_not_belong_together_are_refused(
    llava: VLM, make_picture: MakePicture
) -> None:
    one = [make_picture()]
    with pytest.raises(DataError, match=r"no prompts to encode. Pass at least one"):
        encode(llava, [], [])
    with pytest.raises(DataError, match=r"2 prompts but 1 lists of images. Pass one list"):
        encode(llava, ["a", "b"], [one])
    with pytest.raises(DataError, match=r"1 prompts but 2 answers. Pass one for each"):
        encode(llava, ["a"], [one], ["b", "c"])


def test_empty_answer_is_refused(llava: VLM, make_picture: MakePicture) -> None:
    with pytest.raises(DataError, match=r"answer 1 is empty.*Leave that sample out"):
        encode(llava, ["a", "b"], [[make_picture()]] * 2, ["yes", " \n"])


def test_image_placeholder_in_a_prompt_is_refused(llava: VLM, make_picture: MakePicture) -> None:
    message = r"1 images, but its text has 2 image placeholders '<image>'. Remove '<image>'"
    with pytest.raises(DataError, match=message):
        encode(llava, ["What is <image>?"], [[make_picture()]])


def test_template_that_writes_no_images_is_told(make_picture: MakePicture) -> None:
    vlm = tiny_vlm("llava")
    vlm.processor.chat_template = vlm.processor.chat_template.replace("<image>", "")
    with pytest.raises(DataError, match=r"its text has 0 image placeholders"):
        encode(vlm, ["Hi"], [[make_picture()]])


def test_processor_without_a_template_is_told_what_to_set(make_picture: MakePicture) -> None:
    vlm = tiny_vlm("llava")
    vlm.processor.chat_template = None
    with pytest.raises(DataError, match=r"no chat template. Set vlm.processor.chat_template"):
        encode(vlm, ["Hi"], [[make_picture()]])


def test_template_that_rewrites_the_prompt_is_told(make_picture: MakePicture) -> None:
    vlm = tiny_vlm("llava")
    template = vlm.processor.chat_template
    vlm.processor.chat_template = template.replace("part['text']", "part['text'] | upper")
    with pytest.raises(DataError, match=r"prompt 0 does not appear in what the chat template"):
        encode(vlm, ["Hi"], [[make_picture()]])


def test_model_and_processor_of_two_minds_are_told(make_picture: MakePicture) -> None:
    vlm = load_vlm("tiny/llava", layout=VLMLayout(image_token_id=7))
    with pytest.raises(ShapeError, match=r"0 image positions for 1 images.*image_token_id"):
        encode(vlm, ["Hi"], [[make_picture()]])


def test_template_may_trim_the_prompt() -> None:
    vlm = tiny_vlm("llava")
    template = vlm.processor.chat_template
    vlm.processor.chat_template = template.replace("part['text']", "part['text'] | trim")
    encoded = encode(vlm, ["  Hi there \n"], [[]])
    assert decode(vlm, encoded, encoded.spans.text, 0) == "Hi there"
