"""The modality shift on states whose numbers are known."""

import pytest
import torch

from safebridge.analysis.modality_shift import SHIFT_CURVES, measure_modality_shift
from safebridge.analysis.projection import project_states
from safebridge.analysis.states import PromptStates
from safebridge.errors import DataError, SettingError, ShapeError


def build(*points: tuple[float, float, float], layers: int = 2) -> PromptStates:
    states = torch.tensor([points] * layers, dtype=torch.float32)
    names = tuple(str(i) for i in range(len(points)))
    return PromptStates(states, tuple(range(layers)), names, names)


TEXT = build((3, 0, 0), (3, 0, 0)), build((3, 4, 0), (3, 4, 0))


def test_the_three_curves_of_a_case_solved_by_hand() -> None:
    # Refusal direction (0, 4, 0); harmful pictures moved by (0, -3, 4), length 5 of 5.
    picture = build((3, 0, 4), (3, 0, 4)), build((3, 1, 4), (3, 1, 4))
    found = measure_modality_shift(TEXT, picture, name="base", draws=20)
    assert set(found) == set(SHIFT_CURVES)
    assert found["length"].values == pytest.approx((1.0, 1.0))
    assert found["cosine"].values == pytest.approx((-0.6, -0.6))
    assert found["safety_signal"].values == pytest.approx((0.25, 0.25))
    assert found["cosine"].layers == (0, 1)


def test_pictures_that_are_as_text_lose_nothing() -> None:
    found = measure_modality_shift(TEXT, TEXT, name="base", draws=20)
    assert found["length"].values == pytest.approx((0.0, 0.0))
    assert found["safety_signal"].values == pytest.approx((1.0, 1.0))
    assert found["safety_signal"].low == pytest.approx((1.0, 1.0))


def test_states_of_other_layers_are_refused() -> None:
    other = tuple(build((3, 0, 0), (3, 1, 0), layers=3) for _ in range(2))
    with pytest.raises(ShapeError, match="different models or layers"):
        measure_modality_shift(TEXT, (other[0], other[1]), name="x")


def test_pca_keeps_the_distances_of_points_in_a_plane() -> None:
    generator = torch.Generator().manual_seed(0)
    plane = torch.randn(9, 2, generator=generator) * torch.tensor([3.0, 1.0])
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator))[0][:2]
    flat = project_states(plane @ turn)
    torch.testing.assert_close(
        torch.cdist(flat, flat), torch.cdist(plane, plane), atol=1e-4, rtol=0
    )
    assert torch.equal(flat, project_states(plane @ turn))


def test_tsne_keeps_two_far_clouds_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    clouds = torch.randn(24, 5, generator=generator)
    clouds[12:] += 40
    flat = project_states(clouds, kind="tsne")
    distances = torch.cdist(flat, flat)
    for row in range(24):
        own = distances[row][torch.arange(24) // 12 == row // 12]
        other = distances[row][torch.arange(24) // 12 != row // 12]
        assert own.sort().values[1] < other.min()


def test_too_few_points_and_unknown_kinds_are_refused() -> None:
    with pytest.raises(DataError, match="needs 4 prompts, found 3"):
        project_states(torch.randn(3, 5))
    with pytest.raises(SettingError, match="pca or tsne"):
        project_states(torch.randn(9, 5), kind="umap")
