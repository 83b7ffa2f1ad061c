"""Generation: equal to a plain loop, in order, and ended where it should."""

from collections.abc import Callable

import pytest
import torch
from PIL import Image

from safebridge.errors import DataError
from safebridge.models.generate import generate_answers
from safebridge.models.hooks import capture_output, replace_output
from safebridge.models.load import VLM
from safebridge.models.tokens import encode
from safebridge.testing.tiny import TINY_FAMILIES, tiny_vlm

MakePicture = Callable[..., Image.Image]


@torch.no_grad()
def answer_by_hand(vlm: VLM, prompt: str, images: list[Image.Image], length: int) -> str:
    """Greedy decoding without a cache: one full forward for each token."""
    encoded = encode(vlm, [prompt], [images])
    inputs = dict(encoded.inputs)
    said: list[int] = []
    while len(said) < length:
        logits = vlm.model(**inputs).logits[0, -1]
        logits[vlm.layout.image_token_id :][:1] = -torch.inf  # as the generation config says
        token = int(logits.argmax())
        said.append(token)
        if token == vlm.tokenizer.eos_token_id:
            break
        for name, value in inputs.items():
            if name in {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}:
                is_suffix = vlm.layout.family == "paligemma" and name == "token_type_ids"
                new = {"input_ids": token, "attention_mask": 1}.get(name, int(is_suffix))
                inputs[name] = torch.cat([value, torch.tensor([[new]])], dim=1)
            elif name == "cross_attention_mask":
                inputs[name] = torch.cat([value, value[:, -1:]], dim=1)
    return vlm.tokenizer.decode(said, skip_special_tokens=True).strip()


@pytest.mark.parametrize("family", sorted(TINY_FAMILIES))
def test_answers_are_those_of_a_plain_loop_in_the_given_order(
    family: str, make_picture: MakePicture
) -> None:
    vlm = tiny_vlm(family)
    prompts = ["Hi", "What is this thing here?", "Why?"]
    images = [[make_picture(seed, size=(40, 30 + seed))] for seed in range(3)]
    if family != "instructblip":
        images[2] = []
    found = generate_answers(vlm, prompts, images, max_new_tokens=5, batch_size=2)
    rows = zip(prompts, images, strict=True)
    assert found == [answer_by_hand(vlm, prompt, own, 5) for prompt, own in rows]


def test_answer_ends_at_the_end_of_turn(make_picture: MakePicture) -> None:
    vlm = tiny_vlm("llava")
    script = [*vlm.tokenizer("Yes.")["input_ids"], vlm.tokenizer.eos_token_id, 65, 65]
    step = iter(script)

    def say(logits: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(
            torch.full(logits.shape[:-1], next(step)), logits.shape[-1]
        ).to(logits.dtype)

    with replace_output(vlm.model.lm_head, say):
        answers = generate_answers(vlm, ["Hi"], [[make_picture()]], max_new_tokens=7)
    assert answers == ["Yes."]
    assert list(step) == [65, 65]


def test_a_change_applied_to_the_model_stays_in_force(make_picture: MakePicture) -> None:
    vlm = tiny_vlm("llava")
    images = [[make_picture()]]
    base = generate_answers(vlm, ["Hi"], images, max_new_tokens=4)
    with replace_output(vlm.layout.layer(vlm.model, 0), torch.neg):
        assert generate_answers(vlm, ["Hi"], images, max_new_tokens=4) != base
    assert generate_answers(vlm, ["Hi"], images, max_new_tokens=4) == base


def test_pictures_pass_the_tower_once_for_each_batch(make_picture: MakePicture) -> None:
    vlm = tiny_vlm("llava")
    images = [[make_picture(seed)] for seed in range(4)]
    with capture_output(vlm.layout.get(vlm.model, "projector")) as passes:
        generate_answers(vlm, ["a", "b", "c", "d"], images, max_new_tokens=5, batch_size=2)
    assert len(passes) == 2


def test_progress_counts_the_answers(make_picture: MakePicture) -> None:
    vlm = tiny_vlm("llava")
    counts: list[int] = []
    images = [[make_picture()], [], []]
    generate_answers(
        vlm, ["a", "b", "c"], images, max_new_tokens=1, batch_size=2, progress=counts.append
    )
    assert sorted(counts) == [1, 2]


def test_nothing_to_answer_is_no_error() -> None:
    assert generate_answers(tiny_vlm("llava"), [], []) == []


def test_numbers_and_lists_that_make_no_sense_are_refused(make_picture: MakePicture) -> None:
    vlm = tiny_vlm("llava")
    with pytest.raises(DataError, match=r"1 prompts but 0 lists of images. Pass one list"):
        generate_answers(vlm, ["a"], [])
    with pytest.raises(DataError, match=r"must be 1 or more"):
        generate_answers(vlm, ["a"], [[make_picture()]], batch_size=0)
