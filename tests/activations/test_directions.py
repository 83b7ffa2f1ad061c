"""Directions: against cases solved by hand and plain loops."""

import pytest
import torch

from safebridge.activations.directions import (
    mass_mean_shift,
    measure_sigma,
    orient,
    pca_direction,
    random_directions,
    to_unit,
)
from safebridge.errors import DataError

LABELS = torch.tensor([True, False, True, False])
FEATURES = torch.tensor([[[3.0, 1.0]], [[1.0, 1.0]], [[5.0, 2.0]], [[1.0, 0.0]]])


def test_mass_mean_shift_is_the_difference_of_the_means() -> None:
    assert mass_mean_shift(FEATURES, LABELS).tolist() == [[3.0, 1.0]]


def test_orient_flips_what_points_away_from_the_positive_class() -> None:
    directions = torch.tensor([[-1.0, 0.0]])
    assert orient(directions, FEATURES, LABELS).tolist() == [[1.0, 0.0]]
    assert orient(-directions, FEATURES, LABELS).tolist() == [[1.0, 0.0]]


def test_sigma_is_the_population_deviation_along_the_direction() -> None:
    values = [3.0, 1.0, 5.0, 1.0]
    mean = sum(values) / 4
    expected = (sum((v - mean) ** 2 for v in values) / 4) ** 0.5
    found = measure_sigma(torch.tensor([[1.0, 0.0]]), FEATURES)
    assert found.item() == pytest.approx(expected)


@pytest.mark.parametrize(("groups", "width"), [(30, 6), (6, 40)])
def test_pca_finds_the_shift_within_groups_and_not_the_one_between(groups: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shift = to_unit(torch.randn(width, generator=generator))
    labels = torch.arange(2 * groups) % 2 == 0
    numbers = torch.arange(2 * groups) // 2
    centres = 50 * torch.randn(groups, width, generator=generator)  # far larger than the shift
    noise = 0.05 * torch.randn(2 * groups, width, generator=generator)
    features = centres[numbers] + labels[:, None] * shift + noise
    found = pca_direction(features[:, None], labels, numbers)[0]
    assert float(found @ shift) > 0.95


def test_pca_equals_the_singular_vector_of_the_centred_pairs() -> None:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(20, 1, 5, generator=generator)
    labels, numbers = torch.arange(20) % 2 == 0, torch.arange(20) // 2
    rows = []
    for pair in range(10):
        one, other = features[2 * pair, 0], features[2 * pair + 1, 0]
        rows += [one - (one + other) / 2, other - (one + other) / 2]
    expected = torch.linalg.svd(torch.stack(rows)).Vh[0]
    found = pca_direction(features, labels, numbers)[0]
    assert abs(float(found @ expected)) == pytest.approx(1.0, abs=1e-5)


def test_random_directions_have_length_one_and_follow_their_seed() -> None:
    found = random_directions((3, 8), seed=4)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(3))
    assert torch.equal(found, random_directions((3, 8), seed=4))
    assert not torch.equal(found, random_directions((3, 8), seed=5))


def test_errors_say_what_to_do() -> None:
    with pytest.raises(DataError, match="both classes need samples"):
        mass_mean_shift(FEATURES, torch.ones(4, dtype=torch.bool))
    with pytest.raises(DataError, match="a safe and an unsafe sample"):
        pca_direction(FEATURES, LABELS, torch.tensor([0, 1, 0, 0]))
