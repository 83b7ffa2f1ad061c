import math
from collections.abc import Sequence

import pytest
import torch

from safebridge.data.sample import Sample, open_images
from safebridge.demo.layers import capture_last_states, measure_angular_gap, pairwise_angles
from safebridge.errors import ShapeError
from safebridge.models.tokens import encode
from safebridge.testing.tiny import tiny_vlm


def angle(a: torch.Tensor, b: torch.Tensor) -> float:
    dot = sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))
    lengths = math.dist(a.tolist(), [0.0] * len(a)) * math.dist(b.tolist(), [0.0] * len(b))
    return math.degrees(math.acos(max(-1.0, min(1.0, dot / lengths))))


def test_pairwise_angles_agree_with_a_plain_loop() -> None:
    generator = torch.Generator().manual_seed(1)
    left = torch.randn(3, 4, 8, generator=generator)
    right = torch.randn(3, 5, 8, generator=generator)
    angles = pairwise_angles(left, right)
    for layer in range(3):
        for i in range(4):
            for j in range(5):
                wanted = angle(left[layer, i], right[layer, j])
                assert angles[layer, i, j].item() == pytest.approx(wanted, abs=1e-3)


def test_the_gap_of_a_case_solved_by_hand() -> None:
    # Normal prompts at 0 and 30 degrees, harmful ones at 90: 75 across minus 30 within.
    turn = math.radians(30)
    normal = torch.tensor([[[1.0, 0.0], [math.cos(turn), math.sin(turn)]]])
    harmful = torch.tensor([[[0.0, 2.0], [0.0, 5.0]]])
    curve = measure_angular_gap(normal, harmful, name="text")
    assert curve.values == pytest.approx([45.0], abs=1e-4)
    assert curve.n == 2


def test_the_band_holds_the_value_and_repeats_with_the_seed() -> None:
    generator = torch.Generator().manual_seed(2)
    normal = torch.randn(2, 20, 8, generator=generator) + 4 * torch.eye(8)[0]
    harmful = torch.randn(2, 20, 8, generator=generator) + 4 * torch.eye(8)[1]
    first = measure_angular_gap(normal, harmful, name="a", seed=3)
    assert first == measure_angular_gap(normal, harmful, name="a", seed=3)
    for low, value, high in zip(first.low, first.values, first.high, strict=True):
        assert low < value < high
        assert low > 0


def test_groups_from_one_source_have_no_gap() -> None:
    generator = torch.Generator().manual_seed(4)
    normal = torch.randn(1, 60, 16, generator=generator) + 1
    harmful = torch.randn(1, 60, 16, generator=generator) + 1
    curve = measure_angular_gap(normal, harmful, name="none")
    assert curve.low[0] < 0 < curve.high[0]


def test_states_of_two_models_are_refused() -> None:
    with pytest.raises(ShapeError, match="record both with the same one"):
        pairwise_angles(torch.ones(2, 3, 4), torch.ones(2, 3, 5))


def test_too_few_prompts_are_refused() -> None:
    with pytest.raises(ShapeError, match="raise layer_samples"):
        measure_angular_gap(torch.ones(2, 1, 4), torch.ones(2, 1, 4), name="x")


def test_captured_states_are_those_of_a_plain_forward_pass(samples: Sequence[Sample]) -> None:
    vlm = tiny_vlm("llava")
    states = capture_last_states(vlm, samples, batch_size=2)
    assert states.shape == (vlm.layout.num_layers, len(samples), vlm.layout.hidden_size)
    for index, sample in enumerate(samples):
        inputs = encode(vlm, [sample.prompt], [open_images(sample)]).inputs
        with torch.no_grad():
            hidden = vlm.model(**inputs, output_hidden_states=True).hidden_states
        # The last entry of transformers is after the final norm; the ones before are raw.
        for layer in range(vlm.layout.num_layers - 1):
            torch.testing.assert_close(
                states[layer, index], hidden[layer + 1][0, -1].float(), atol=1e-4, rtol=1e-3
            )


def test_capturing_leaves_no_hook(samples: Sequence[Sample]) -> None:
    vlm = tiny_vlm("llava")
    with torch.no_grad():  # transformers hangs hooks of its own on a model at first use
        vlm.model(**encode(vlm, [samples[0].prompt], [open_images(samples[0])]).inputs)
    before = [len(module._forward_hooks) for module in vlm.model.modules()]
    capture_last_states(vlm, samples, batch_size=2)
    assert [len(module._forward_hooks) for module in vlm.model.modules()] == before
