"""Layouts: how places are resolved, and what a wrong one is told."""

import pytest
from torch import nn

from safebridge.errors import LayoutError, ShapeError
from safebridge.models.layout import VLMLayout
from safebridge.models.load import VLM
from safebridge.testing.tiny import tiny_vlm


@pytest.fixture(scope="module")
def llava() -> VLM:
    return tiny_vlm("llava")


@pytest.fixture(scope="module")
def mllama() -> VLM:
    return tiny_vlm("mllama")


def test_places_are_the_modules_themselves(llava: VLM) -> None:
    core = llava.model.model
    assert llava.layout.get(llava.model, "projector") is core.multi_modal_projector
    assert llava.layout.layer(llava.model, 1) is core.language_model.layers[1]
    attention = core.language_model.layers[1].self_attn
    assert llava.layout.in_layer(llava.model, 1, "attention") is attention
    assert llava.layout.in_layer(llava.model, 1, "attention_output") is attention.o_proj


def test_minus_one_is_the_last_layer(llava: VLM) -> None:
    layers = llava.model.model.language_model.layers
    assert llava.layout.layer(llava.model, -1) is layers[3]
    assert llava.layout.layer(llava.model, -4) is layers[0]


@pytest.mark.parametrize("layer", [4, -5])
def test_layer_that_is_not_there_is_told_which_are(llava: VLM, layer: int) -> None:
    with pytest.raises(ShapeError, match=r"no decoder layer -?\d: this llava has 4.*from 0 to 3"):
        llava.layout.layer(llava.model, layer)


def test_cross_attention_layer_gives_its_cross_attention(mllama: VLM) -> None:
    layer = mllama.model.model.language_model.layers[1]
    assert mllama.layout.cross_attention_layers == (1,)
    assert mllama.layout.in_layer(mllama.model, 1, "attention") is layer.cross_attn
    assert mllama.layout.in_layer(mllama.model, -3, "attention_output") is layer.cross_attn.o_proj
    assert mllama.layout.in_layer(mllama.model, 1, "mlp") is layer.mlp
    assert mllama.layout.in_layer(mllama.model, 0, "attention") is not layer.cross_attn


def test_unknown_place_is_told_the_known_ones(llava: VLM) -> None:
    with pytest.raises(LayoutError, match=r"no place 'projektor'. Known: vision_tower, projector"):
        llava.layout.get(llava.model, "projektor")
    with pytest.raises(LayoutError, match=r"no place 'head'. Known: attention"):
        llava.layout.in_layer(llava.model, 0, "head")


def test_empty_path_is_told_what_to_name() -> None:
    with pytest.raises(LayoutError, match=r'no projector named.*VLMLayout\(projector="<path>"'):
        VLMLayout().get(nn.Linear(1, 1), "projector")


def test_check_names_the_path_that_leads_nowhere(llava: VLM) -> None:
    wrong = VLMLayout(vision_tower="model.tower")
    with pytest.raises(
        LayoutError, match=r"no vision_tower at 'model.tower' in Llava.*add-a-model"
    ):
        wrong.check(llava.model)


def test_describe_is_the_expression_that_builds_the_layout(mllama: VLM) -> None:
    text = mllama.layout.describe()
    assert eval(text, {"VLMLayout": VLMLayout}) == mllama.layout  # noqa: S307 - our own text
