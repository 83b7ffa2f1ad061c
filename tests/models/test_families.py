"""The finders: causal tests on tiny models, shapes on published ones, and their errors."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from safebridge.errors import LayoutError
from safebridge.models.families import FAMILIES, find_layout
from safebridge.models.hooks import capture_output, replace_input, replace_output
from safebridge.models.layout import MODEL_PLACES, VLMLayout
from safebridge.models.load import VLM
from safebridge.models.tokens import Encoded, encode
from safebridge.testing.tiny import TINY_FAMILIES, tiny_vlm

PUBLISHED = json.loads(Path(__file__).with_name("published_configs.json").read_text())["models"]
# Mllama's image enters by cross-attention, also at positions before the image token.
EMBEDDING = sorted(set(TINY_FAMILIES) - {"mllama"})


@pytest.fixture(params=sorted(TINY_FAMILIES))
def vlm(request: pytest.FixtureRequest) -> VLM:
    return tiny_vlm(request.param)


@pytest.fixture
def picture(make_picture: Callable[..., Image.Image]) -> Image.Image:
    return make_picture()


def encode_one(vlm: VLM, picture: Image.Image) -> Encoded:
    return encode(vlm, ["What is this?"], [[picture]], ["A cat."])


@torch.no_grad()
def logits_of(vlm: VLM, encoded: Encoded) -> Tensor:
    return vlm.model(**encoded.inputs).logits[0]


def first_position(mask: Tensor) -> int:
    return int(mask[0].nonzero()[0])


def find_cut(vlm: VLM, encoded: Encoded) -> int:
    """The first position whose change earlier ones must not see.

    That is the image where something stands before it; InstructBLIP's image stands first,
    and PaliGemma's image and prompt see each other, so that only its answer is causal.
    """
    if vlm.layout.family == "paligemma":
        return first_position(encoded.spans.answer)
    if vlm.layout.family == "instructblip":
        return first_position(encoded.spans.text)
    return first_position(encoded.spans.image)


def scramble(hidden: Tensor) -> Tensor:
    return torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)) * 2


def scramble_from(cut: int) -> Callable[[Tensor], Tensor]:
    def change(hidden: Tensor) -> Tensor:
        is_changed = (torch.arange(hidden.shape[1]) >= cut)[None, :, None]
        return torch.where(is_changed, scramble(hidden), hidden)

    return change


@torch.no_grad()
def test_projector_output_reaches_the_logits(vlm: VLM, picture: Image.Image) -> None:
    encoded = encode_one(vlm, picture)
    base = logits_of(vlm, encoded)
    projector = vlm.layout.get(vlm.model, "projector")
    with capture_output(projector) as seen, replace_output(projector, scramble):
        changed = logits_of(vlm, encoded)
    answer = encoded.spans.answer[0]
    assert (changed - base)[answer].abs().amax() > 1e-3
    assert all(hidden.shape[-1] == vlm.layout.hidden_size for hidden in seen)
    assert torch.equal(logits_of(vlm, encoded), base)


@pytest.mark.parametrize("family", EMBEDDING)
def test_projector_output_enters_at_the_image_span_only(family: str, picture: Image.Image) -> None:
    vlm = tiny_vlm(family)
    encoded = encode_one(vlm, picture)
    first_layer = vlm.layout.layer(vlm.model, 0)
    entered: list[Tensor] = []
    with replace_input(first_layer, lambda hidden: entered.append(hidden) or hidden):
        logits_of(vlm, encoded)
        with replace_output(vlm.layout.get(vlm.model, "projector"), scramble):
            logits_of(vlm, encoded)
    is_changed = (entered[0] != entered[1]).any(dim=-1)
    assert bool(is_changed.any())
    assert not bool((is_changed & ~encoded.spans.image).any())


@pytest.mark.parametrize("family", sorted(set(EMBEDDING) - {"instructblip", "paligemma"}))
def test_positions_before_the_image_do_not_see_the_projector(
    family: str, picture: Image.Image
) -> None:
    vlm = tiny_vlm(family)
    encoded = encode_one(vlm, picture)
    before = first_position(encoded.spans.image)
    assert before > 0
    base = logits_of(vlm, encoded)
    with replace_output(vlm.layout.get(vlm.model, "projector"), scramble):
        changed = logits_of(vlm, encoded)
    assert torch.equal(changed[:before], base[:before])
    assert bool((changed[before:] != base[before:]).any())


def test_overwriting_a_span_changes_the_logits_from_there_on_only(
    vlm: VLM, picture: Image.Image
) -> None:
    encoded = encode_one(vlm, picture)
    cut = find_cut(vlm, encoded)
    base = logits_of(vlm, encoded)
    for layer in range(vlm.layout.num_layers):
        with replace_output(vlm.layout.layer(vlm.model, layer), scramble_from(cut)):
            changed = logits_of(vlm, encoded)
        assert torch.equal(changed[:cut], base[:cut])
        assert (changed - base)[cut:].abs().amax() > 1e-3


def test_overwriting_one_head_changes_the_logits_from_there_on_only(
    vlm: VLM, picture: Image.Image
) -> None:
    encoded = encode_one(vlm, picture)
    cut = find_cut(vlm, encoded)
    base = logits_of(vlm, encoded)
    size = vlm.layout.head_dim
    for layer in range(vlm.layout.num_layers):
        for head in (0, vlm.layout.num_heads - 1):

            def change(heads: Tensor, first: int = head * size) -> Tensor:
                assert heads.shape[-1] == vlm.layout.num_heads * size
                is_head = torch.zeros(heads.shape[-1], dtype=torch.bool)
                is_head[first : first + size] = True
                return torch.where(is_head, scramble_from(cut)(heads), heads)

            output = vlm.layout.in_layer(vlm.model, layer, "attention_output")
            with replace_input(output, change):
                changed = logits_of(vlm, encoded)
            assert torch.equal(changed[:cut], base[:cut])
            assert (changed - base)[cut:].abs().amax() > 1e-4


def test_attention_and_mlp_are_all_that_a_layer_adds(vlm: VLM, picture: Image.Image) -> None:
    encoded = encode_one(vlm, picture)
    for layer in range(vlm.layout.num_layers):
        module = vlm.layout.layer(vlm.model, layer)
        entered: list[Tensor] = []
        attention, mlp = (vlm.layout.in_layer(vlm.model, layer, p) for p in ("attention", "mlp"))
        with (
            replace_output(attention, torch.zeros_like),
            replace_output(mlp, torch.zeros_like),
            replace_input(module, lambda hidden, seen=entered: seen.append(hidden) or hidden),
            capture_output(module) as left,
        ):
            logits_of(vlm, encoded)
        assert torch.equal(entered[0], left[0])


def test_attention_output_is_the_last_step_of_the_attention(vlm: VLM, picture: Image.Image) -> None:
    encoded = encode_one(vlm, picture)
    for layer in range(vlm.layout.num_layers):
        places = ("attention", "attention_output")
        whole, last = (vlm.layout.in_layer(vlm.model, layer, place) for place in places)
        with capture_output(whole) as attention, capture_output(last) as projected:
            logits_of(vlm, encoded)
        assert torch.equal(attention[0], projected[0])


def test_embedding_norm_and_head_are_the_ends_of_the_decoder(
    vlm: VLM, picture: Image.Image
) -> None:
    encoded = encode_one(vlm, picture)
    layout, model = vlm.layout, vlm.model
    with (
        capture_output(layout.get(model, "embed_tokens")) as embedded,
        capture_output(layout.layer(model, -1)) as stream,
        capture_output(layout.get(model, "final_norm")) as normed,
    ):
        logits = logits_of(vlm, encoded)
    with torch.no_grad():
        assert torch.equal(layout.get(model, "final_norm")(stream[0]), normed[0])
        assert torch.equal(layout.get(model, "lm_head")(normed[0])[0], logits)
    assert embedded[0].shape == (*encoded.inputs["input_ids"].shape, layout.hidden_size)


def test_vision_tower_reaches_the_logits(vlm: VLM, picture: Image.Image) -> None:
    encoded = encode_one(vlm, picture)
    base = logits_of(vlm, encoded)
    tower = vlm.layout.get(vlm.model, "vision_tower")
    patches = next(m for m in tower.modules() if isinstance(m, nn.Conv2d | nn.Conv3d))
    assert patches.out_channels == vlm.layout.vision_hidden_size
    with replace_output(patches, scramble):
        assert (logits_of(vlm, encoded) - base).abs().amax() > 1e-3


def test_sizes_are_those_of_the_modules(vlm: VLM) -> None:
    layout = vlm.layout
    attention = layout.in_layer(vlm.model, 0, "attention")
    assert attention.k_proj.out_features == layout.num_kv_heads * layout.head_dim
    assert attention.q_proj.out_features == layout.num_heads * layout.head_dim
    assert layout.get(vlm.model, "lm_head").weight.shape == (layout.vocab_size, layout.hidden_size)
    assert len(layout.get(vlm.model, "decoder_layers")) == layout.num_layers


def test_paligemma_image_and_prompt_see_each_other(picture: Image.Image) -> None:
    vlm = tiny_vlm("paligemma")
    encoded = encode_one(vlm, picture)
    last_of_prompt = first_position(encoded.spans.answer) - 1
    base = logits_of(vlm, encoded)
    with replace_output(vlm.layout.layer(vlm.model, 0), scramble_from(last_of_prompt)):
        changed = logits_of(vlm, encoded)
    assert bool((changed != base).any(dim=-1).all())


def test_gemma3_tokens_of_one_image_see_each_other(picture: Image.Image) -> None:
    vlm = tiny_vlm("gemma3")
    encoded = encode_one(vlm, picture)
    first, last = encoded.spans.image[0].nonzero()[[0, -1], 0].tolist()
    base = logits_of(vlm, encoded)
    with replace_output(vlm.layout.layer(vlm.model, 0), scramble_from(last)):
        changed = logits_of(vlm, encoded)
    assert torch.equal(changed[:first], base[:first])
    assert bool((changed[first] != base[first]).any())


def test_mllama_image_enters_at_the_cross_attention_layers(picture: Image.Image) -> None:
    vlm = tiny_vlm("mllama")
    encoded = encode_one(vlm, picture)
    (cross,) = vlm.layout.cross_attention_layers
    with (
        capture_output(vlm.layout.layer(vlm.model, cross - 1)) as before,
        capture_output(vlm.layout.layer(vlm.model, cross)) as after,
    ):
        logits_of(vlm, encoded)
        with replace_output(vlm.layout.get(vlm.model, "projector"), scramble):
            logits_of(vlm, encoded)
    assert torch.equal(before[0], before[1])
    assert bool((after[0] != after[1]).any())


def test_paligemma_tower_is_deeper_than_its_decoder() -> None:
    config = tiny_vlm("paligemma").model.config
    assert config.vision_config.num_hidden_layers > config.text_config.num_hidden_layers


def test_every_family_of_the_finders_has_a_tiny_model() -> None:
    assert {tiny_vlm(name).layout.family for name in TINY_FAMILIES} == set(TINY_FAMILIES)
    assert set(FAMILIES) == set(TINY_FAMILIES) - {"pixtral"}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_configuration_has_the_published_shapes(name: str) -> None:
    expected = PUBLISHED[name]
    config = dict(expected["config"])
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(
            AutoConfig.for_model(config.pop("model_type"), **config)
        )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters / 1e9 == pytest.approx(expected["billions"], rel=0.005)
    layout = find_layout(model)
    found: dict[str, Any] = {
        key: getattr(layout, key)
        for key in expected
        if key not in {"config", "billions", "heads", "cross_attention_layers"}
    }
    assert found == {key: expected[key] for key in found}
    assert [layout.num_heads, layout.num_kv_heads, layout.head_dim] == expected["heads"]
    assert list(layout.cross_attention_layers) == expected["cross_attention_layers"]
    attention = layout.in_layer(model, -1, "attention")
    assert attention.k_proj.out_features == layout.num_kv_heads * layout.head_dim


class FooConfig(LlavaConfig):
    model_type = "foo"


class FooForConditionalGeneration(LlavaForConditionalGeneration):
    """A family that nobody knows; its parts are LLaVA's."""


def foo() -> Any:
    model = tiny_vlm("llava").model
    model.__class__ = FooForConditionalGeneration
    model.config = FooConfig(
        **{k: v for k, v in model.config.to_dict().items() if k != "model_type"}
    )
    return model


def test_unknown_family_is_told_what_it_looks_like_and_what_to_pass() -> None:
    with pytest.raises(LayoutError, match=r"model_type 'foo'.*layout=VLMLayout.*add-a-model"):
        find_layout(foo())
    with pytest.raises(LayoutError, match=r"projector='model\.multi_modal_projector'"):
        find_layout(foo())


def test_missing_part_of_an_unknown_family_is_told_where_it_was_looked_for() -> None:
    model = foo()
    model.model.bridge = model.model.multi_modal_projector
    del model.model.multi_modal_projector
    message = (
        r"no projector found in FooForConditionalGeneration \(model_type 'foo'\)\. Tried: "
        r"model\.multi_modal_projector, model\.connector, model\.visual\.merger.*"
        r'Pass layout=VLMLayout\(projector="<path>", \.\.\.\) or see docs/add-a-model\.md'
    )
    with pytest.raises(LayoutError, match=message):
        find_layout(model)
    layout = find_layout(model, given=VLMLayout(projector="model.bridge"))
    assert layout.get(model, "projector") is model.model.bridge
    assert layout.family == "foo"


def test_found_places_can_be_passed_back_as_they_are_printed() -> None:
    model = foo()
    try:
        find_layout(model)
    except LayoutError as error:
        printed = str(error).partition("look like ")[2].rpartition("; pass that")[0]
    given = eval(printed, {"VLMLayout": VLMLayout})  # noqa: S307 - it is our own message
    assert find_layout(model, given=given) == given


@pytest.mark.parametrize("place", [*MODEL_PLACES, "attention", "attention_output", "mlp"])
def test_wrong_path_in_a_given_layout_is_named(place: str) -> None:
    model = tiny_vlm("llava").model
    with pytest.raises(LayoutError, match=rf"{place} at '[\w.]*nowhere'.*layout=VLMLayout"):
        find_layout(model, given=VLMLayout(**{place: "nowhere"}))


def test_wrong_sizes_in_a_given_layout_are_named() -> None:
    model = tiny_vlm("llava").model
    with pytest.raises(LayoutError, match=r"has 4 decoder layers .* says 3.*num_layers=4"):
        find_layout(model, given=VLMLayout(num_layers=3))
    with pytest.raises(LayoutError, match=r"takes 32 features, but 8 heads of 8 make 64"):
        find_layout(model, given=VLMLayout(num_heads=8, head_dim=8))


def test_text_model_is_told_to_be_no_vision_language_model() -> None:
    text = LlamaForCausalLM(tiny_vlm("llava").model.config.text_config)
    with pytest.raises(LayoutError, match=r"no vision tower.*Pass a vision-language model"):
        find_layout(text)


def test_encoder_decoder_model_is_refused() -> None:
    config = AutoConfig.for_model("instructblip", text_config={"model_type": "t5", "num_layers": 1})
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    with pytest.raises(LayoutError, match=r"encoder-decoder.*instructblip-vicuna-7b"):
        find_layout(model)
