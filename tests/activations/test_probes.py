"""Probes: equal to scikit-learn's, ranked the same way every time, split by group."""

import pytest
import torch
from torch import Tensor

from safebridge.activations.probes import fit_probes, measure_probes, rank_sites, split_groups
from safebridge.errors import DataError, SettingError


def data(n: int, sites: int, width: int, gap: float = 0.5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n + width)
    labels = torch.arange(n) % 3 == 0
    features = torch.randn(n, sites, width, generator=generator)
    features[labels] += gap * torch.randn(sites, width, generator=generator)
    return features, labels


@pytest.mark.parametrize(
    ("n", "width", "gap", "factor"),
    [
        (120, 16, 0.5, 1.0),
        (30, 64, 0.5, 1.0),  # fewer samples than features
        (120, 8, 20.0, 1.0),  # classes far apart
        (120, 16, 0.5, 100.0),
        (120, 16, 0.5, 0.01),
    ],
)
def test_probes_equal_scikit_learns(n: int, width: int, gap: float, factor: float) -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    features, labels = data(n, 5, width, gap)
    probes = fit_probes(features, labels, inverse_regularisation=factor, tolerance=1e-9)
    for site in range(5):
        model = linear.LogisticRegression(C=factor, tol=1e-9, max_iter=100_000)
        model.fit(features[:, site].double().numpy(), labels.numpy())
        expected = torch.from_numpy(model.coef_[0])
        torch.testing.assert_close(probes.weight[site], expected, atol=1e-4, rtol=1e-3)
        assert probes.bias[site].item() == pytest.approx(model.intercept_[0], abs=1e-3)


def test_residual_streams_with_outliers_converge_to_the_minimum() -> None:
    features, labels = data(80, 3, 24)
    features[..., 0] = 300 + 5 * features[..., 0]  # as the massive activations of language models
    probes = fit_probes(features, labels, tolerance=1e-8)
    signs = labels.double() * 2 - 1
    weight = probes.weight.clone().requires_grad_()
    bias = probes.bias.clone().requires_grad_()
    margins = torch.einsum("nsw,sw->ns", features.double(), weight) + bias
    loss = (
        torch.nn.functional.softplus(-signs[:, None] * margins).sum() + 0.5 * weight.square().sum()
    )
    loss.backward()
    assert weight.grad is not None
    assert float(weight.grad.abs().max()) < 1e-4


def test_accuracy_and_loss_are_those_of_the_logits() -> None:
    features, labels = data(60, 4, 6)
    probes = fit_probes(features[:40], labels[:40])
    accuracy, loss = measure_probes(probes, features[40:], labels[40:])
    for site in range(4):
        right, total = 0, 0.0
        for x, y in zip(features[40:, site].double(), labels[40:].tolist(), strict=True):
            p = torch.sigmoid(x @ probes.weight[site] + probes.bias[site])
            right += int((p > 0.5) == y)
            total -= float(torch.log(p if y else 1 - p))
        assert accuracy[site].item() == pytest.approx(right / 20)
        assert loss[site].item() == pytest.approx(total / 20)


def test_ranking_breaks_ties_by_loss_and_then_by_number() -> None:
    accuracy = torch.tensor([0.9, 0.95, 0.9, 0.95, 0.9])
    loss = torch.tensor([0.3, 0.2, 0.1, 0.2, 0.3])
    assert rank_sites(accuracy, loss).tolist() == [1, 3, 2, 0, 4]


def test_the_split_keeps_groups_whole_and_follows_its_seed() -> None:
    groups = [f"g{number // 3}" for number in range(30)]
    held_out = split_groups(groups, validation_ratio=0.2, seed=1)
    sides = {
        group: {bool(held_out[i]) for i in range(30) if groups[i] == group} for group in groups
    }
    assert all(len(side) == 1 for side in sides.values())
    assert sum(True in side for side in sides.values()) == 2
    assert torch.equal(held_out, split_groups(groups, validation_ratio=0.2, seed=1))
    assert not torch.equal(held_out, split_groups(groups, validation_ratio=0.2, seed=2))


def test_errors_say_what_to_do() -> None:
    features, labels = data(12, 1, 2)
    with pytest.raises(DataError, match="Give safe and unsafe"):
        fit_probes(features, torch.ones(12, dtype=torch.bool))
    with pytest.raises(SettingError, match="above 0"):
        fit_probes(features, labels, inverse_regularisation=0.0)
    features[0, 0, 0] = float("nan")
    with pytest.raises(SettingError, match="not finite"):
        fit_probes(features, labels)
    with pytest.raises(DataError, match="two groups"):
        split_groups(["a", "a"], validation_ratio=0.5, seed=0)
    with pytest.raises(SettingError, match="between 0 and 1"):
        split_groups(["a", "b"], validation_ratio=1.0, seed=0)
