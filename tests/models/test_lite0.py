import pytest
import torch
from torch import nn
from transformers import AutoModel

from safebridge.models.lite0 import (
    GRID_TOKENS,
    Lite0Config,
    Lite0VisionModel,
    _SameConv,
    convert_state_dict,
    register,
)


@pytest.fixture(scope="module")
def tower() -> Lite0VisionModel:
    torch.manual_seed(0)
    return Lite0VisionModel(Lite0Config()).eval()


def test_a_picture_becomes_a_global_token_and_a_grid(tower: Lite0VisionModel) -> None:
    with torch.inference_mode():
        out = tower(torch.rand(2, 3, 224, 224) * 2 - 1)
    assert out.last_hidden_state.shape == (2, GRID_TOKENS, 1280)
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)


def test_the_first_token_is_the_mean_over_all_places(tower: Lite0VisionModel) -> None:
    kept: list[torch.Tensor] = []
    handle = tower.head.register_forward_hook(lambda _m, _i, out: kept.append(out))
    with torch.inference_mode():
        out = tower(torch.rand(1, 3, 224, 224))
    handle.remove()
    features = nn.functional.relu6(kept[0])
    assert features.shape[-2:] == (7, 7)
    torch.testing.assert_close(out.last_hidden_state[:, 0], features.mean((2, 3)))
    torch.testing.assert_close(out.last_hidden_state[:, 1], features[..., :3, :3].mean((2, 3)))


def test_same_padding_puts_the_odd_pixel_after_as_tensorflow_does() -> None:
    conv = _SameConv(1, 1, 3, stride=2, bias=False)
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[0, 0, 0, 0] = 1.0
    picture = torch.arange(16.0).reshape(1, 1, 4, 4)
    # With no padding before, output (i, j) reads input (2i, 2j).
    assert conv(picture).flatten().tolist() == [0.0, 2.0, 8.0, 10.0]


def test_published_names_map_onto_every_tensor(tower: Lite0VisionModel) -> None:
    published = {}
    parts = ("_expand_conv", "_bn0", "_depthwise_conv", "_bn1", "_project_conv", "_bn2")
    own = ("expand.0", "expand.1", "depthwise.0", "depthwise.1", "project.0", "project.1")
    top = {"stem.0": "_conv_stem", "stem.1": "_bn0", "head.0": "_conv_head", "head.1": "_bn1"}
    for key, value in tower.state_dict().items():
        name = key
        for theirs, ours in zip(parts, own, strict=True):
            name = name.replace(f".{ours}.", f".{theirs}.") if key.startswith("blocks") else name
        for ours, theirs in top.items():
            name = name.replace(f"{ours}.", f"{theirs}.") if not key.startswith("blocks") else name
        published[name.replace("blocks.", "_blocks.", 1)] = value
    published["_fc.weight"] = torch.zeros(1000, 1280)
    converted = convert_state_dict(published)
    assert converted.keys() == tower.state_dict().keys()
    assert all(torch.equal(converted[key], value) for key, value in tower.state_dict().items())


def test_gradients_reach_the_pixels(tower: Lite0VisionModel) -> None:
    pixels = torch.rand(1, 3, 224, 224, requires_grad=True)
    tower(pixels).last_hidden_state.sum().backward()
    assert pixels.grad is not None
    assert pixels.grad.abs().sum() > 0


def test_registering_twice_is_harmless() -> None:
    register()
    register()
    assert isinstance(AutoModel.from_config(Lite0Config()), Lite0VisionModel)
