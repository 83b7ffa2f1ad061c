"""Every position of virtual tokens on every family, where one plain batch does not show it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from safebridge.artifacts.store import ArtifactMetadata
from safebridge.data.sample import Sample, open_images
from safebridge.errors import SettingError
from safebridge.methods.security_tensors.config import SecurityTensorsConfig
from safebridge.methods.security_tensors.method import SecurityTensors
from safebridge.models.load import VLM
from safebridge.models.tokens import Encoded, encode
from safebridge.testing.tiny import TINY_FAMILIES

POSITIONS = ["prefix", "after_image"]
ONE_PICTURE = {"instructblip"}
FAMILIES = [name for name in TINY_FAMILIES if name not in ONE_PICTURE]
MIXED = [name for name in FAMILIES if name not in {"mllama", "paligemma"}]
"""Families whose batches may have rows with and without a picture."""


def tensor(vlm: VLM, position: str, applies_to: str = "all") -> SecurityTensors:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, vlm.layout.hidden_size, generator=generator)
    config = SecurityTensorsConfig(num_virtual_tokens=3, position=position, applies_to=applies_to)
    metadata = ArtifactMetadata(vlm.name, None, vlm.fingerprint, "d", 0)
    return SecurityTensors(config, {"tokens": tokens}, metadata)


def encoded(vlm: VLM, triad: list[Sample], prompts: list[str], side: Any = "left") -> Encoded:
    """Encode each prompt with two pictures."""
    pictures = [open_images(triad[0]) + open_images(triad[1]) for _ in prompts]
    return encode(vlm, prompts, pictures, padding_side=side)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_with_several_pictures_a_padded_batch_equals_its_rows(
    tiny: Callable[[str], VLM], triad: list[Sample], family: str, position: str
) -> None:
    vlm, prompts = tiny(family), ["How?", "How is this made?"]
    with tensor(vlm, position).apply(vlm), torch.no_grad():
        for side in ("left", "right"):
            batch = encoded(vlm, triad, prompts, side).inputs
            together = vlm.model(**batch).logits
            for row, prompt in enumerate(prompts):
                alone = vlm.model(**encoded(vlm, triad, [prompt]).inputs).logits[0]
                found = together[row, batch["attention_mask"][row].bool()]
                torch.testing.assert_close(found, alone, atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize("family", [n for n in FAMILIES if n not in {"paligemma", "gemma3"}])
def test_after_image_stands_behind_the_last_of_several_pictures(
    tiny: Callable[[str], VLM], triad: list[Sample], family: str
) -> None:
    vlm = tiny(family)
    both = encoded(vlm, triad, ["How?"])
    inputs, last = both.inputs, int(both.spans.image[0].nonzero().max())
    with torch.no_grad():
        before = vlm.model(**inputs).logits[0]
        with tensor(vlm, "after_image").apply(vlm):
            after = vlm.model(**inputs).logits[0]
    # A causal decoder computes what stands before the virtual tokens as it did without them.
    torch.testing.assert_close(after[: last + 1], before[: last + 1], atol=1e-4, rtol=1e-3)
    assert not torch.allclose(after[last + 1 :], before[last + 1 :], atol=1e-3)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_beam_search_with_a_cache_finds_what_it_finds_without(
    tiny: Callable[[str], VLM], triad: list[Sample], family: str, position: str
) -> None:
    vlm = tiny(family)
    inputs = encode(vlm, ["How?", "How so?"], [open_images(s) for s in triad[:2]]).inputs
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 3, "do_sample": False}
    with tensor(vlm, position).apply(vlm), torch.no_grad():
        cached, uncached = (
            vlm.model.generate(**inputs, **options, use_cache=use_cache,
                               return_dict_in_generate=True, output_scores=True)
            for use_cache in (True, False)
        )  # fmt: skip
    torch.testing.assert_close(
        cached.sequences_scores, uncached.sequences_scores, atol=1e-3, rtol=1e-3
    )
    assert torch.equal(cached.sequences, uncached.sequences)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_rotary_positions_of_three_axes_move_by_the_virtual_tokens(
    tiny: Callable[[str], VLM], triad: list[Sample], family: str
) -> None:
    vlm, seen = tiny(family), []
    inputs = encoded(vlm, triad, ["How?"]).inputs
    decoder = vlm.layout.get(vlm.model, "language_model")
    handle = decoder.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    try:
        with torch.no_grad():
            vlm.model(**inputs)
            for position in POSITIONS:
                with tensor(vlm, position).apply(vlm):
                    vlm.model(**inputs)
    finally:
        handle.remove()
    plain, prefix, after = (positions[-3:, 0] for positions in seen)
    assert torch.equal(prefix[:, 3:], plain + 3)
    last = int(inputs["input_ids"][0].eq(vlm.layout.image_token_id).nonzero().max())
    assert torch.equal(after[:, : last + 1], plain[:, : last + 1])
    assert torch.equal(after[:, last + 4 :], plain[:, last + 1 :] + 3)


PLAIN = ["idefics3", "internvl", "llava", "llava_next", "llava_onevision",
         "mistral3", "pixtral", "qwen2_5_vl", "qwen2_vl", "smolvlm"]  # fmt: skip


@pytest.mark.parametrize("family", PLAIN)
def test_a_prefix_passes_the_decoder_once_for_all_prompts(
    tiny: Callable[[str], VLM], triad: list[Sample], family: str
) -> None:
    vlm, widths = tiny(family), []
    inputs = encode(vlm, ["How?"], [open_images(triad[0])]).inputs
    options = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False}
    layer = vlm.layout.layer(vlm.model, 0)

    def note(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        widths.append((kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]).shape[1])

    def generate() -> torch.Tensor:
        tokens: torch.Tensor = vlm.model.generate(
            **inputs, **options, output_logits=True, return_dict_in_generate=True
        ).logits[1]
        return tokens

    handle = layer.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.no_grad(), tensor(vlm, "prefix").apply(vlm):
            first, second = generate(), generate()
        with torch.enable_grad(), tensor(vlm, "prefix").apply(vlm):  # the plain way
            output = vlm.model(**inputs, use_cache=True)
    finally:
        handle.remove()
    seq = inputs["input_ids"].shape[1]
    assert widths == [3, seq, 1, seq, 1, seq + 3]
    assert torch.equal(first, second)
    assert output.logits.shape[1] == seq


@pytest.mark.parametrize("family", [name for name in TINY_FAMILIES if name not in PLAIN])
def test_decoders_that_take_more_than_embeddings_see_the_prefix_each_time(
    tiny: Callable[[str], VLM], triad: list[Sample], family: str
) -> None:
    vlm = tiny(family)
    inputs = encode(vlm, ["How?"], [open_images(triad[0])]).inputs
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    with torch.no_grad(), tensor(vlm, "prefix").apply(vlm):
        cached, uncached = (
            vlm.model.generate(**inputs, **options, use_cache=use_cache)
            for use_cache in (True, False)
        )
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("family", MIXED)
def test_a_tensor_for_pictures_leaves_requests_in_text_alone(
    tiny: Callable[[str], VLM], triad: list[Sample], family: str, position: str
) -> None:
    vlm, method = tiny(family), tensor(tiny(family), position, "pictures")
    text = encode(vlm, ["How is it made?"], [[]]).inputs
    shown = encode(vlm, ["How?"], [open_images(triad[0])]).inputs
    mixed = encode(vlm, ["How is it made?", "How?"], [[], open_images(triad[0])]).inputs
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False,
               "output_logits": True, "return_dict_in_generate": True}  # fmt: skip
    with torch.no_grad():
        plain = vlm.model(**text).logits
        with tensor(vlm, position).apply(vlm):
            defended = vlm.model(**shown).logits
        with method.apply(vlm):
            assert torch.equal(vlm.model(**text).logits, plain)
            torch.testing.assert_close(vlm.model(**shown).logits, defended)
            alone = [vlm.model.generate(**each, **options).logits for each in (text, shown)]
            together = vlm.model.generate(**mixed, **options).logits
    for step in range(3):
        for row in range(2):
            torch.testing.assert_close(
                together[step][row], alone[row][step][0], atol=2e-4, rtol=2e-3
            )


def test_a_tensor_for_pictures_needs_a_model_that_marks_them(
    tiny: Callable[[str], VLM],
) -> None:
    vlm = tiny("llava")
    method = tensor(vlm, "prefix", "pictures")
    vlm = replace(vlm, layout=replace(vlm.layout, image_token_id=None))
    with pytest.raises(SettingError, match="marks no pictures"), method.apply(vlm):
        pass
