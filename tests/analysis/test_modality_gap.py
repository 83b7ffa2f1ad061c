from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from safebridge.analysis.modality_gap import (
    capture_pairs,
    compare_states,
    measure_modality_gap,
    paired_cosines,
)
from safebridge.data.sample import Sample, open_images
from safebridge.errors import DataError, SettingError, ShapeError
from safebridge.models.load import VLM
from safebridge.models.tokens import encode


def draw(seed: int, n: int = 12) -> torch.Tensor:
    return torch.randn(2, n, 6, generator=torch.Generator().manual_seed(seed))


def test_cosines_equal_numpy() -> None:
    image, caption = draw(0), draw(1)
    for is_centred in (False, True):
        found = paired_cosines(image, caption, is_centred=is_centred)
        for layer in range(2):
            a, b = image[layer].double().numpy(), caption[layer].double().numpy()
            if is_centred:
                a, b = a - a.mean(0), b - b.mean(0)
            norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
            np.testing.assert_allclose(found[layer], (a * b).sum(1) / norms, rtol=1e-5)


def test_a_common_offset_hides_the_gap_from_the_raw_cosine_alone() -> None:
    gap = compare_states(draw(0) + 50.0, draw(1) + 50.0)
    assert min(gap.raw) > 0.99
    assert max(map(abs, gap.centred)) < 0.4


def test_own_captions_stand_out_from_those_of_others() -> None:
    image = draw(0)
    gap = compare_states(image, image + 0.1 * draw(1))
    assert min(gap.centred) > 0.9
    assert max(gap.mismatched) < 0.3


def test_refusal_goes_with_the_cosine_where_it_does() -> None:
    image, noise = draw(0, 40), draw(1, 40)
    is_refused = [number % 2 == 0 for number in range(40)]
    near = torch.tensor(is_refused)[None, :, None]
    caption = torch.where(near, image, noise)
    gap = compare_states(image, caption, is_refused=is_refused)
    assert gap.correlation is not None
    assert gap.refused is not None
    assert gap.answered is not None
    cosines = paired_cosines(image, caption, is_centred=True)[0].double().numpy()
    expected = np.corrcoef(cosines, np.array(is_refused, dtype=float))[0, 1]
    assert gap.correlation[0] == pytest.approx(expected, abs=1e-4)
    assert gap.correlation[0] > 0.7
    assert gap.refused[0] > gap.answered[0]


def test_refusals_that_do_not_vary_have_no_correlation() -> None:
    gap = compare_states(draw(0), draw(1), is_refused=[True] * 12)
    assert gap.correlation == (0.0, 0.0)
    assert gap.answered is None
    assert compare_states(draw(0), draw(1)).correlation is None


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3"])
def test_states_are_the_means_over_image_tokens(
    tiny: Callable[[str], VLM], shown: list[Sample], family: str
) -> None:
    vlm = tiny(family)
    image, caption = capture_pairs(vlm, shown, batch_size=3)
    assert image.shape == caption.shape == (vlm.layout.num_layers, 4, vlm.layout.hidden_size)
    encoded = encode(vlm, ["How?"], [open_images(shown[2])])
    with torch.no_grad():
        states = vlm.model(**encoded.inputs, output_hidden_states=True).hidden_states
    expected = states[2][encoded.spans.image].mean(dim=0)
    torch.testing.assert_close(image[1, 2], expected, atol=1e-4, rtol=1e-3)


def test_the_gap_is_measured_in_one_go(tiny: Callable[[str], VLM], shown: list[Sample]) -> None:
    vlm = tiny("llava")
    gap = measure_modality_gap(vlm, shown, is_refused=[True, False, True, False])
    assert gap.n == 4
    assert len(gap.raw) == len(gap.centred) == vlm.layout.num_layers
    assert gap.to_json()["n"] == 4


def test_what_cannot_be_compared_is_refused(
    tiny: Callable[[str], VLM], shown: list[Sample]
) -> None:
    with pytest.raises(DataError, match="needs a picture and a caption"):
        measure_modality_gap(tiny("llava"), [replace(shown[0], caption="")])
    with pytest.raises(DataError, match="no samples"):
        measure_modality_gap(tiny("llava"), [])
    with pytest.raises(DataError, match="two pairs or more"):
        measure_modality_gap(tiny("llava"), shown[:1])
    with pytest.raises(SettingError, match="cross-attention"):
        measure_modality_gap(tiny("mllama"), shown)
    with pytest.raises(ShapeError, match="same samples"):
        compare_states(draw(0), draw(1, 5))
    with pytest.raises(ShapeError, match="3 refusals"):
        compare_states(draw(0), draw(1), is_refused=[True] * 3)
