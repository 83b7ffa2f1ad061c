"""Tiny models: small, the same every time, and without effect on the random state."""

import pytest
import torch

from safebridge import testing
from safebridge.errors import UnknownNameError
from safebridge.testing.tiny import TINY_FAMILIES, tiny_vlm


@pytest.mark.parametrize("family", sorted(TINY_FAMILIES))
def test_tiny_model_is_tiny_and_the_same_every_time(family: str) -> None:
    one, two = tiny_vlm(family), tiny_vlm(family)
    assert 40_000 < sum(p.numel() for p in one.model.parameters()) < 80_000
    assert one.fingerprint == two.fingerprint
    assert one.name == f"tiny/{family}"
    assert one.layout.family == family
    assert not one.model.training


def test_building_leaves_the_random_state_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    tiny_vlm("llava")
    assert torch.equal(torch.rand(1), expected)


def test_models_of_two_calls_share_nothing() -> None:
    one, two = tiny_vlm("llava"), tiny_vlm("llava")
    with torch.no_grad():
        one.model.lm_head.weight.zero_()
    assert bool(two.model.lm_head.weight.any())


def test_unknown_family_is_told_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match=r"no tiny family 'qwen2'. Did you mean 'qwen2_vl'"):
        tiny_vlm("qwen2")


def test_face_gives_the_same_objects() -> None:
    assert testing.tiny_vlm is tiny_vlm
    assert "tiny_vlm" in dir(testing)
    with pytest.raises(AttributeError, match=r"no attribute 'huge_vlm'"):
        _ = testing.huge_vlm
