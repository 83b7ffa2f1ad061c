from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from safebridge.data.sample import Sample, open_images
from safebridge.errors import SettingError, ShapeError
from safebridge.methods.security_tensors.application import apply_tensors
from safebridge.methods.security_tensors.pixels import (
    add_pixels,
    add_to_pictures,
    find_picture_shape,
    find_pixel_limits,
    resample_pixels,
    split_into_patches,
)
from safebridge.models.load import VLM
from safebridge.models.tokens import encode

ANY_SIZE = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "pixtral", "mistral3"]


@pytest.fixture(scope="module")
def oblong(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    path: Path = tmp_path_factory.mktemp("oblong") / "o.png"
    pixels = np.random.default_rng(1).integers(0, 255, (32, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return Sample(id="o", prompt="How?", images=(path,), answer="So.", set_name="GB")


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_patches_are_laid_out_as_the_processor_does_it(tiny: Callable[[str], VLM]) -> None:
    processor = tiny("qwen2_vl").processor.image_processor
    picture = noise(3, 32, 64)
    expected, _, _ = processor.patchify(
        picture.numpy(), processor.patch_size, processor.merge_size, processor.temporal_patch_size
    )
    found = split_into_patches(
        picture,
        patch=processor.patch_size,
        frames=processor.temporal_patch_size,
        merge=processor.merge_size,
    )
    assert torch.equal(found, torch.from_numpy(np.ascontiguousarray(expected)))


@pytest.mark.parametrize("family", ANY_SIZE)
def test_pictures_of_any_size_get_the_tensor_in_their_own(
    tiny: Callable[[str], VLM], triad: list[Sample], oblong: Sample, family: str
) -> None:
    vlm, pixels = tiny(family), noise(3, 32, 32)
    samples = [triad[0], oblong]
    pictures = [open_images(sample) for sample in samples]
    with torch.no_grad(), apply_tensors(vlm, tokens=None, pixels=pixels):
        together = encode(vlm, ["How?", "How?"], pictures).inputs
        logits = vlm.model(**together).logits
        for row, own in enumerate(pictures):
            alone = vlm.model(**encode(vlm, ["How?"], [own]).inputs).logits[0]
            found = logits[row, together["attention_mask"][row].bool()]
            torch.testing.assert_close(found, alone, atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize("family", ["qwen2_vl", "pixtral", "llava", "mllama"])
def test_the_tensor_is_differentiable_through_every_form_of_picture(
    tiny: Callable[[str], VLM], triad: list[Sample], oblong: Sample, family: str
) -> None:
    vlm = tiny(family)
    inputs = encode(vlm, ["a", "b"], [open_images(triad[0]), open_images(oblong)]).inputs
    shape = find_picture_shape(vlm, inputs)
    pixels = torch.zeros(shape, requires_grad=True)
    changed = add_to_pictures(vlm, inputs, pixels)["pixel_values"]
    (gradient,) = torch.autograd.grad(changed.sum(), pixels)
    assert bool((gradient > 0).all())
    assert torch.equal(changed, inputs["pixel_values"])


def test_padding_beside_a_smaller_picture_stays_as_it_was(
    tiny: Callable[[str], VLM], triad: list[Sample], oblong: Sample
) -> None:
    vlm = tiny("pixtral")
    inputs = encode(vlm, ["a", "b"], [open_images(triad[0]), open_images(oblong)]).inputs
    changed = add_to_pictures(vlm, inputs, torch.ones(3, 32, 32))["pixel_values"]
    height, width = inputs["image_sizes"][0].tolist()
    difference = (changed - inputs["pixel_values"])[0]
    assert torch.allclose(difference[:, :height, :width], torch.ones(()))
    assert width < difference.shape[-1]
    assert not difference[:, :, width:].any()


def test_the_side_of_the_tensor_can_be_chosen_where_pictures_have_any_size(
    tiny: Callable[[str], VLM], oblong: Sample
) -> None:
    for family in ANY_SIZE:
        inputs = encode(tiny(family), ["a"], [open_images(oblong)]).inputs
        assert find_picture_shape(tiny(family), inputs, side=24) == (3, 24, 24)
        assert find_picture_shape(tiny(family), inputs) == (3, 32, 64)
    inputs = encode(tiny("llava"), ["a"], [open_images(oblong)]).inputs
    assert find_picture_shape(tiny("llava"), inputs, side=24) == (3, 32, 32)


def test_resampling_keeps_a_bound_and_a_constant() -> None:
    pixels = noise(3, 16, 16).clamp(-0.5, 0.5)
    for size in ((8, 8), (40, 24), (16, 16)):
        found = resample_pixels(pixels, *size)
        assert tuple(found.shape) == (3, *size)
        assert float(found.abs().max()) <= 0.5 + 1e-6
    assert torch.allclose(resample_pixels(torch.full((3, 4, 4), 0.3), 9, 7), torch.tensor(0.3))


def test_a_bound_in_pixels_is_one_after_undoing_the_preprocessing(
    tiny: Callable[[str], VLM], triad: list[Sample]
) -> None:
    vlm = tiny("llava")
    processor = vlm.processor.image_processor
    limits = find_pixel_limits(vlm, 8.0)
    plain, brighter = (
        processor(Image.new("RGB", (32, 32), (value,) * 3), return_tensors="pt")["pixel_values"]
        for value in (100, 108)
    )
    torch.testing.assert_close((brighter - plain)[0], limits.expand(3, 32, 32))
    assert triad


def test_each_tile_can_have_its_own_tensor() -> None:
    pictures = torch.ones(1, 1, 2, 3, 4, 4)
    pixels = torch.stack([torch.full((3, 4, 4), 1.0), torch.full((3, 4, 4), 2.0)])
    found = add_pixels(pictures, pixels)
    assert found[0, 0, :, 0, 0, 0].tolist() == [2.0, 3.0]
    with pytest.raises(ShapeError, match="Use the processor it was fitted with"):
        add_pixels(torch.ones(1, 1, 3, 3, 4, 4), pixels)


def test_patches_without_their_grids_are_refused(
    tiny: Callable[[str], VLM], triad: list[Sample]
) -> None:
    vlm = tiny("qwen2_vl")
    inputs = encode(vlm, ["a"], [open_images(triad[0])]).inputs
    del inputs["image_grid_thw"]
    with pytest.raises(SettingError, match="Call the model with the processor's output"):
        add_to_pictures(vlm, inputs, torch.zeros(3, 32, 32))


def test_inputs_without_pictures_pass_as_they_are(tiny: Callable[[str], VLM]) -> None:
    vlm = tiny("llava")
    inputs = encode(vlm, ["a"], [[]]).inputs
    changed = add_to_pictures(vlm, inputs, torch.ones(3, 32, 32))
    assert changed.keys() == inputs.keys()
    with pytest.raises(SettingError, match='Use modality="textual"'):
        find_picture_shape(vlm, inputs)
