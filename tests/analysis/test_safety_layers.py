"""Safety layers against a plain loop, cases solved by hand, and planted layers."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch

from safebridge.analysis.curves import LayerCurve, draw_weights
from safebridge.analysis.safety_layers import (
    SafetyRange,
    find_safety_range,
    measure_activation_shift,
    measure_angular_gap,
    measure_pair_angles,
    measure_shift_difference,
    pairwise_angles,
)
from safebridge.analysis.states import PromptStates, capture_states, join_states
from safebridge.data.sample import Sample, open_images
from safebridge.errors import DataError, ShapeError
from safebridge.models.load import VLM
from safebridge.models.tokens import encode


def angle(a: torch.Tensor, b: torch.Tensor) -> float:
    dot = sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))
    lengths = math.dist(a.tolist(), [0.0] * len(a)) * math.dist(b.tolist(), [0.0] * len(b))
    return math.degrees(math.acos(max(-1.0, min(1.0, dot / lengths))))


def build_states(
    states: torch.Tensor,
    wordings: Sequence[str] | None = None,
    clusters: Sequence[str] | None = None,
) -> PromptStates:
    n = states.shape[1]
    return PromptStates(
        states=states,
        layers=tuple(range(len(states))),
        wordings=tuple(wordings or ["same"] * n),
        clusters=tuple(clusters or [str(i) for i in range(n)]),
    )


def plant(layer: int, *, layers: int = 8, n: int = 12) -> tuple[PromptStates, PromptStates]:
    """Return states that carry harmfulness from one layer on, growing over two layers."""
    generator = torch.Generator().manual_seed(layer)
    sides = []
    for side in (0.0, 1.0):
        states = 0.1 * torch.randn(layers, n, 16, generator=generator)
        states[..., 0] += 1.0
        for number in range(layers):
            states[number, :, 1] += side * min(2, max(0, number - layer + 1))
        sides.append(build_states(states))
    return sides[0], sides[1]


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


@pytest.mark.parametrize("same_wording", [False, True])
def test_the_curves_agree_with_a_plain_loop_over_pairs(*, same_wording: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    wordings = ("a", "b", "a", "b", "a")
    normal = build_states(torch.randn(3, 5, 8, generator=generator), wordings)
    harmful = build_states(torch.randn(3, 4, 8, generator=generator), wordings[:4])
    gap = measure_angular_gap(normal, harmful, name="x", same_wording=same_wording, draws=5)
    inside, across = measure_pair_angles(normal, harmful, same_wording=same_wording, draws=5)
    for layer in range(3):
        own = [
            angle(normal.states[layer, i], normal.states[layer, j])
            for i in range(5)
            for j in range(5)
            if i != j and (not same_wording or wordings[i] == wordings[j])
        ]
        other = [
            angle(normal.states[layer, i], harmful.states[layer, j])
            for i in range(5)
            for j in range(4)
            if not same_wording or wordings[i] == wordings[j]
        ]
        n_n, n_m = sum(own) / len(own), sum(other) / len(other)
        assert inside.values[layer] == pytest.approx(n_n, abs=1e-3)
        assert across.values[layer] == pytest.approx(n_m, abs=1e-3)
        assert gap.values[layer] == pytest.approx(n_m - n_n, abs=1e-3)


def test_the_gap_of_a_case_solved_by_hand() -> None:
    # Normal prompts at 0 and 30 degrees, harmful ones at 90: 75 across minus 30 within.
    turn = math.radians(30)
    normal = build_states(torch.tensor([[[1.0, 0.0], [math.cos(turn), math.sin(turn)]]]))
    harmful = build_states(torch.tensor([[[0.0, 2.0], [0.0, 5.0]]]))
    curve = measure_angular_gap(normal, harmful, name="text")
    assert curve.values == pytest.approx([45.0], abs=1e-4)
    assert curve.n == 2


def test_pairs_of_one_wording_leave_its_noise_out() -> None:
    # Two wordings at right angles; within each, harm turns by 10 degrees.
    turn = math.radians(10)
    normal = torch.tensor([[[1.0, 0, 0], [1.0, 0, 0], [0, 1.0, 0], [0, 1.0, 0]]])
    harm = torch.tensor([[math.cos(turn), 0, math.sin(turn)], [0, math.cos(turn), math.sin(turn)]])
    groups = (
        build_states(normal, ["a", "a", "b", "b"]),
        build_states(harm[None].repeat_interleave(2, dim=1), ["a", "a", "b", "b"]),
    )
    inside = measure_angular_gap(*groups, name="x", same_wording=True)
    assert inside.values == pytest.approx([10.0], abs=1e-3)
    assert measure_angular_gap(*groups, name="x").values[0] < 0


def test_the_band_holds_the_value_and_repeats_with_the_seed() -> None:
    generator = torch.Generator().manual_seed(2)
    axes = torch.eye(8)
    normal = build_states(torch.randn(2, 20, 8, generator=generator) + 4 * axes[0])
    harmful = build_states(torch.randn(2, 20, 8, generator=generator) + 4 * axes[1])
    first = measure_angular_gap(normal, harmful, name="a", seed=3)
    assert first == measure_angular_gap(normal, harmful, name="a", seed=3)
    for low, value, high in zip(first.low, first.values, first.high, strict=True):
        assert low < value < high
        assert low > 0


def test_groups_from_one_source_have_no_gap() -> None:
    generator = torch.Generator().manual_seed(4)
    sides = [build_states(torch.randn(1, 60, 16, generator=generator) + 1) for _ in range(2)]
    curve = measure_angular_gap(sides[0], sides[1], name="none")
    assert curve.low[0] < 0 < curve.high[0]
    assert find_safety_range(curve) is None


def test_whole_clusters_are_drawn() -> None:
    weights = draw_weights(
        ["a", "a", "b", "c"], draws=50, generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(weights[:, 0], weights[:, 1])
    assert (weights[:, 1:].sum(dim=1) == 3).all()


@pytest.mark.parametrize("layer", [0, 2, 5])
def test_a_planted_layer_is_found(layer: int) -> None:
    normal, harmful = plant(layer)
    found = find_safety_range(measure_angular_gap(normal, harmful, name="x"))
    assert found is not None
    assert (found.first, found.last) == (layer, layer + 1)


def test_the_range_ends_where_growth_does() -> None:
    values = (0.0, 0.2, 3.0, 8.0, 9.0, 9.1, 4.0)
    gap = LayerCurve("x", values, tuple(v - 0.5 for v in values), values, 9, (0, 1, 2, 4, 5, 6, 7))
    assert find_safety_range(gap) == SafetyRange(first=2, last=4, peak=6)
    assert find_safety_range(gap, growth_share=0.15) == SafetyRange(first=2, last=5, peak=6)
    assert find_safety_range(gap, least_degrees=9.0) is None


def test_one_layer_alone_is_no_range() -> None:
    values = (0.0, 0.0, 9.0, 0.0)
    assert find_safety_range(LayerCurve("x", values, values, values, 9)) is None


def test_a_defense_that_turns_harmful_prompts_only_shows() -> None:
    normal, harmful = plant(3)
    turned = torch.stack([harmful.states[..., 1], harmful.states[..., 0]], dim=-1)
    moved = build_states(torch.cat([turned, harmful.states[..., 2:]], dim=-1))
    still = measure_activation_shift(normal, normal, name="N-(N+d)")
    assert max(still.values) == pytest.approx(0.0, abs=1e-4)
    shift = measure_activation_shift(harmful, moved, name="M-(M+d)")
    wanted = [angle(harmful.states[1, i], moved.states[1, i]) for i in range(harmful.n)]
    assert shift.values[1] == pytest.approx(sum(wanted) / len(wanted), abs=1e-3)
    difference = measure_shift_difference((normal, normal), (harmful, moved), name="x")
    assert difference.values == pytest.approx(shift.values, abs=1e-3)


def test_what_does_not_fit_together_says_what_to_do() -> None:
    ones = build_states(torch.ones(2, 3, 4))
    with pytest.raises(ShapeError, match="record both with the same one"):
        pairwise_angles(torch.ones(2, 3, 4), torch.ones(2, 3, 5))
    with pytest.raises(ShapeError, match="record both with the same one"):
        join_states(ones, build_states(torch.ones(3, 3, 4)))
    with pytest.raises(ShapeError, match="raise layer_samples"):
        measure_angular_gap(build_states(torch.ones(2, 1, 4)), ones, name="x")
    with pytest.raises(DataError, match="same_wording=False"):
        measure_angular_gap(
            build_states(torch.ones(2, 3, 4), "abc"), ones, name="x", same_wording=True
        )
    with pytest.raises(ShapeError, match="record both with the same samples"):
        measure_activation_shift(ones, build_states(torch.ones(2, 2, 4)), name="x")


def test_captured_states_are_those_of_a_plain_forward_pass(
    tiny: Callable[[str], VLM], shown: list[Sample]
) -> None:
    vlm = tiny("llava")
    found = capture_states(vlm, shown, batch_size=2)
    assert found.layers == tuple(range(vlm.layout.num_layers))
    for index, sample in enumerate(shown):
        inputs = encode(vlm, [sample.prompt], [open_images(sample)]).inputs
        with torch.no_grad():
            hidden = vlm.model(**inputs, output_hidden_states=True).hidden_states
        # The last entry of transformers is after the final norm; the ones before are raw.
        for layer in range(vlm.layout.num_layers - 1):
            torch.testing.assert_close(
                found.states[layer, index], hidden[layer + 1][0, -1], atol=1e-4, rtol=1e-3
            )


def test_states_of_text_and_pictures_fit_together_where_layers_are_skipped(
    tiny: Callable[[str], VLM], shown: list[Sample]
) -> None:
    vlm = tiny("mllama")
    texts = [Sample(f"t{i}", f"How {i}?") for i in range(3)]
    joined = join_states(capture_states(vlm, shown), capture_states(vlm, texts))
    assert not set(joined.layers) & set(vlm.layout.cross_attention_layers)
    assert joined.n == len(shown) + len(texts)
