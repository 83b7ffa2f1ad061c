"""Probe maps: planted sites are found, naming a thing does not help, areas as scikit-learn's."""

import pytest
import torch
from sklearn.metrics import roc_auc_score

from safebridge.analysis.probe_maps import SiteFeatures, _auc, measure_probe_map
from safebridge.errors import DataError

SITES, WIDTH, THINGS = 6, 8, 10


def build(seed: int, site: int | None, *, shift: float = 0.0) -> SiteFeatures:
    """Return three prompts about each thing; one site carries harmfulness, all name the thing."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randn(2 * THINGS, SITES, WIDTH, generator=torch.Generator().manual_seed(99))
    features = own.repeat_interleave(3, dim=0)
    features = features + 0.3 * torch.randn(features.shape, generator=generator)
    labels = torch.arange(2 * THINGS).repeat_interleave(3) < THINGS
    if site is not None:
        features[:, site, 0] += 6 * labels.float() + shift
    groups = tuple(str(i) for i in range(2 * THINGS) for _ in range(3))
    return SiteFeatures(features, labels, groups)


@pytest.mark.parametrize("site", [0, 3, 5])
def test_a_planted_site_is_found_within_and_across_media(site: int) -> None:
    text, picture = build(0, site), build(1, site)
    for tested in (text, picture):
        found = measure_probe_map(text, tested, name="x")
        assert max(range(SITES), key=lambda i: found.accuracy[i]) == site
        assert found.accuracy[site] > 0.9
        assert found.n == 6 * THINGS


def test_naming_the_thing_does_not_help() -> None:
    found = measure_probe_map(build(0, None), build(1, None), name="x")
    assert sum(found.accuracy) / SITES < 0.7


def test_a_shift_of_all_pictures_lowers_the_accuracy_and_not_the_area() -> None:
    found = measure_probe_map(build(0, 2), build(1, 2, shift=-30.0), name="x")
    assert found.accuracy[2] == pytest.approx(0.5)
    assert found.auc[2] > 0.85


def test_the_area_is_scikit_learns() -> None:
    logits = torch.randn(30, 3, dtype=torch.float64).round(decimals=1)
    labels = torch.arange(30) % 3 == 0
    wanted = [roc_auc_score(labels.numpy(), logits[:, i].numpy()) for i in range(3)]
    assert _auc(logits, labels) == pytest.approx(wanted)


def test_too_few_things_or_other_sites_are_refused() -> None:
    small = build(0, None)
    one = SiteFeatures(small.features, small.is_harmful, ("a",) * 30 + ("b",) * 30)
    with pytest.raises(DataError, match="two harmful and two harmless"):
        measure_probe_map(one, one, name="x")
    narrow = SiteFeatures(small.features[:, :2], small.is_harmful, small.groups)
    with pytest.raises(DataError, match="same places"):
        measure_probe_map(small, narrow, name="x")
