"""Text that stands before the images of a turn."""

from functools import cache

import numpy as np
import pytest
from PIL import Image

from safebridge.errors import DataError
from safebridge.models.generate import generate_answers
from safebridge.models.load import VLM
from safebridge.models.tokens import encode
from safebridge.testing.tiny import TINY_FAMILIES, tiny_vlm

CHAT = [name for name in TINY_FAMILIES if name not in {"paligemma", "instructblip"}]
tiny = cache(tiny_vlm)


def picture(seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def spanned(vlm: VLM, ids: object, mask: object) -> str:
    return str(vlm.tokenizer.decode(ids[mask]))  # type: ignore[index]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", CHAT)
def test_a_prefix_stands_before_the_image_and_has_its_own_span(family: str, side: str) -> None:
    vlm = tiny(family)
    plain = encode(vlm, ["How?"], [[picture()]], ["So."], padding_side="left")
    found = encode(
        vlm,
        ["How?", "And this one?"],
        [[picture()], [picture(1)]],
        ["So.", "Thus."],
        padding_side=side,  # type: ignore[arg-type] - pytest gives a plain string
        prefixes=["A dog, or two", ""],
        prefix_format="Text: {}. ",
    )
    ids, spans = found.inputs["input_ids"], found.spans
    assert spanned(vlm, ids[0], spans.prefix[0]) == "A dog, or two"
    assert spanned(vlm, ids[0], spans.text[0]) == "How?"
    assert "So." in spanned(vlm, ids[0], spans.answer[0])
    assert not spans.prefix[1].any()
    assert spans.prefix[0].nonzero().max() < spans.image[0].nonzero().min()
    assert spans.image[0].sum() == plain.spans.image[0].sum()
    assert "Text: A dog, or two. " in vlm.tokenizer.decode(ids[0])
    together = spans.prefix.int() + spans.image.int() + spans.text.int() + spans.answer.int()
    assert together.max() == 1


def test_a_prefix_needs_no_image() -> None:
    vlm = tiny("llava")
    found = encode(vlm, ["How?"], [[]], prefixes=["A dog"], prefix_format="Text: {}. ")
    ids = found.inputs["input_ids"][0]
    assert "Text: A dog. How?" in vlm.tokenizer.decode(ids)
    assert spanned(vlm, ids, found.spans.prefix[0]) == "A dog"
    assert spanned(vlm, ids, found.spans.text[0]) == "How?"


def test_without_prefixes_nothing_is_written() -> None:
    vlm = tiny("llava")
    plain = encode(vlm, ["How?"], [[picture()]])
    empty = encode(vlm, ["How?"], [[picture()]], prefixes=[""], prefix_format="Text: {}. ")
    assert plain.inputs["input_ids"].equal(empty.inputs["input_ids"])
    assert not plain.spans.prefix.any()


def test_prefixes_must_be_as_many_as_prompts() -> None:
    with pytest.raises(DataError, match="Pass one for each, empty for none"):
        encode(tiny("llava"), ["How?"], [[]], prefixes=["a", "b"])
    with pytest.raises(DataError, match="Pass one for each, empty for none"):
        generate_answers(tiny("llava"), ["How?"], [[]], prefixes=[])


def test_a_placeholder_in_a_prefix_is_refused() -> None:
    with pytest.raises(DataError, match="Remove '<image>'"):
        encode(tiny("llava"), ["How?"], [[picture()]], prefixes=["an <image>"])


@pytest.mark.parametrize("family", ["paligemma", "instructblip"])
def test_plain_forms_have_no_place_for_a_prefix(family: str) -> None:
    with pytest.raises(DataError, match="Write that text into the prompt"):
        encode(tiny(family), ["How?"], [[picture()]], prefixes=["A dog"])


def test_answers_are_generated_after_their_own_prefix() -> None:
    vlm = tiny("llava")
    prompts, images = ["How?", "And this one?", "What?"], [[picture(n)] for n in range(3)]
    prefixes = ["A dog", "", "Two cats on a mat"]
    together = generate_answers(vlm, prompts, images, max_new_tokens=4, prefixes=prefixes)
    alone = [
        generate_answers(vlm, [prompt], [own], max_new_tokens=4, prefixes=[prefix])[0]
        for prompt, own, prefix in zip(prompts, images, prefixes, strict=True)
    ]
    without = generate_answers(vlm, prompts, images, max_new_tokens=4)
    assert together == alone
    assert together != without
