from collections import Counter

import pytest
import torch

from safebridge.methods.security_tensors.objective import (
    answer_cross_entropy,
    answer_forward_kl,
    answer_top_k_kl,
    build_batches,
    keep_first_labels,
    keep_top_k,
)

ROWS = torch.tensor([0, 0, 1])


def test_cross_entropy_is_the_mean_over_each_answer() -> None:
    logits, targets = torch.randn(3, 5), torch.tensor([1, 2, 3])
    single = [-logits[i].log_softmax(-1)[targets[i]] for i in range(3)]
    expected = torch.stack([(single[0] + single[1]) / 2, single[2]])
    torch.testing.assert_close(answer_cross_entropy(logits, targets, ROWS, 2), expected)


def test_forward_kl_equals_a_plain_loop() -> None:
    logits, reference = torch.randn(3, 5), torch.randn(3, 5)
    p0, p = reference.softmax(-1), logits.softmax(-1)
    single = [sum(a * (a / b).log() for a, b in zip(p0[i], p[i], strict=True)) for i in range(3)]
    expected = torch.stack([(single[0] + single[1]) / 2, single[2]])
    torch.testing.assert_close(answer_forward_kl(logits, reference, ROWS, 2), expected)


def test_forward_kl_of_a_model_to_itself_is_zero() -> None:
    logits = torch.randn(3, 5)
    assert answer_forward_kl(logits, logits + 2.0, ROWS, 2).abs().max() < 1e-6


def test_top_k_kl_equals_a_plain_loop_over_the_kept_and_the_rest() -> None:
    logits, reference = torch.randn(3, 6), torch.randn(3, 6)
    p0, p = reference.softmax(-1), logits.softmax(-1)
    single = []
    for i in range(3):
        kept = sorted(range(6), key=lambda v, i=i: -float(p0[i, v]))[:2]
        left = [v for v in range(6) if v not in kept]
        pairs = [(p0[i, v], p[i, v]) for v in kept] + [(p0[i, left].sum(), p[i, left].sum())]
        single.append(sum(a * (a / b).log() for a, b in pairs))
    expected = torch.stack([(single[0] + single[1]) / 2, single[2]])
    found = answer_top_k_kl(logits, *keep_top_k(reference, 2), ROWS, 2)
    torch.testing.assert_close(found, expected)
    assert bool((found <= answer_forward_kl(logits, reference, ROWS, 2) + 1e-6).all())


@pytest.mark.parametrize("top_k", [5, 100])
def test_top_k_kl_over_the_whole_vocabulary_is_the_forward_kl(top_k: int) -> None:
    logits, reference = torch.randn(3, 6), torch.randn(3, 6)
    found = answer_top_k_kl(logits, *keep_top_k(reference, top_k), ROWS, 2)
    torch.testing.assert_close(found, answer_forward_kl(logits, reference, ROWS, 2))


def test_top_k_kl_of_a_model_to_itself_is_zero_with_a_zero_gradient() -> None:
    logits = torch.randn(3, 6, requires_grad=True)
    loss = answer_top_k_kl(logits, *keep_top_k(logits.detach() + 2.0, 2), ROWS, 2)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert loss.abs().max() < 1e-6
    assert gradient.abs().max() < 1e-6


def test_every_sample_is_in_one_batch_of_its_group() -> None:
    groups = [number % 2 for number in range(50)]
    batches = build_batches(list(range(50)), groups, [0] * 50, 4, seed=0)
    assert sorted(index for batch in batches for index in batch) == list(range(50))
    assert all(len({groups[index] for index in batch}) == 1 for batch in batches)
    assert max(len(batch) for batch in batches) == 4


def test_batches_hold_samples_of_similar_length() -> None:
    lengths = torch.randint(1, 100, (128,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = build_batches(lengths, [0] * 128, [0] * 128, 8, seed=0)
    padded = sum(len(b) * max(lengths[i] for i in b) for b in batches)
    assert padded < 1.3 * sum(lengths)


def test_every_batch_has_the_same_mixture_of_strata() -> None:
    strata = ["SA"] * 40 + ["TCB"] * 40 + ["GB"] * 20
    lengths = [10] * 40 + [30] * 40 + [20] * 20
    for batch in build_batches(lengths, [0] * 100, strata, 10, seed=0):
        counts = Counter(strata[index] for index in batch)
        assert abs(counts["SA"] - 4) <= 1
        assert abs(counts["TCB"] - 4) <= 1
        assert abs(counts["GB"] - 2) <= 1


@pytest.mark.parametrize("seed", [0, 1])
def test_the_seed_decides_the_order(seed: int) -> None:
    first = build_batches([1] * 40, [0] * 40, [0] * 40, 4, seed)
    assert build_batches([1] * 40, [0] * 40, [0] * 40, 4, seed) == first
    assert build_batches([1] * 40, [0] * 40, [0] * 40, 4, seed + 1) != first


def test_only_the_first_labels_of_each_row_are_kept() -> None:
    labels = torch.tensor([[-100, 5, 6, 7], [8, 9, -100, -100]])
    kept = keep_first_labels(labels, 2)
    assert kept.tolist() == [[-100, 5, 6, -100], [8, 9, -100, -100]]
    assert keep_first_labels(labels, 0) is labels
