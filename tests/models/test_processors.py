"""Processors without torchvision: no video half, and Pixtral's text."""

import sys

import pytest
import transformers
from PIL import Image

from safebridge.errors import MissingExtraError
from safebridge.models import processors
from safebridge.models.families import FAMILIES
from safebridge.models.processors import PixtralProcessor, images_only, naming_extra
from safebridge.testing.tiny import tiny_vlm


def test_images_only_drops_the_video_half_and_nothing_else() -> None:
    original = transformers.Qwen2VLProcessor
    changed = images_only(original)
    assert issubclass(changed, original)
    assert changed.__name__ == original.__name__
    assert original.get_attributes() == ["image_processor", "tokenizer", "video_processor"]
    assert changed.get_attributes() == ["image_processor", "tokenizer"]


def test_images_only_leaves_a_class_without_video_as_it_is() -> None:
    assert images_only(transformers.LlavaProcessor) is transformers.LlavaProcessor


def test_nothing_of_torchvision_is_imported() -> None:
    tiny_vlm("qwen2_vl")
    assert "torchvision" not in sys.modules


def test_pixtral_writes_an_image_row_by_row() -> None:
    processor = tiny_vlm("pixtral").processor
    assert isinstance(processor, PixtralProcessor)
    # 24 x 17 pixels with patches of 8 become 3 columns of 3 rows, the height rounded up.
    text = processor(text="[IMG]", images=Image.new("RGB", (24, 17)))["input_ids"][0]
    row = "[IMG]" * 3
    assert processor.tokenizer.decode(text) == f"{row}[IMG_BREAK]{row}[IMG_BREAK]{row}[IMG_END]"


def test_missing_num2words_names_its_extra() -> None:
    message = r'pip install "safebridge\[smolvlm\]"'
    with pytest.raises(MissingExtraError, match=message), naming_extra():
        raise ImportError("Package `num2words` is required to run SmolVLM processor.")
    with pytest.raises(ImportError, match=r"other"), naming_extra():
        raise ImportError("other")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_family_names_a_processor_class_that_can_be_had(family: str) -> None:
    config = transformers.AutoConfig.for_model(family)
    found = processors._find_class("nowhere", config, {}, {"revision": None})
    assert found is not None
    assert issubclass(found, transformers.ProcessorMixin)
