import math

import pytest
import torch
from torch import Tensor

from safebridge.methods.text_guided_alignment.objective import (
    answer_cross_entropy,
    build_batches,
    guide_terms,
    pool_span,
)

LAYERS, BATCH, HIDDEN = 3, 4, 5


def draw(seed: int) -> Tensor:
    return torch.randn(LAYERS, BATCH, HIDDEN, generator=torch.Generator().manual_seed(seed))


def cosine(left: Tensor, right: Tensor) -> float:
    product = sum(a * b for a, b in zip(left.tolist(), right.tolist(), strict=True))
    return product / math.hypot(*left.tolist()) / math.hypot(*right.tolist())


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("form", ["paper", "repository"])
def test_both_forms_equal_a_plain_loop(form: str, reduction: str) -> None:
    image, caption, retrieved, tau = draw(0), draw(1), draw(2), 0.25
    terms = guide_terms(image, caption, retrieved, form=form, reduction=reduction, progress=tau)
    for row in range(BATCH):
        align = pair = 0.0
        for layer in range(LAYERS):
            near = cosine(image[layer, row], caption[layer, row])
            far = cosine(retrieved[layer, row], caption[layer, row])
            if form == "paper":
                align -= near
                pair += math.log(1 + math.exp(-(near - far)))
            else:
                align += 0.25 * (1 - tau) * math.exp(-near)
                pair += 0.10 * (1 - tau) ** 2 * math.exp(far - near)
        count = LAYERS if reduction == "mean" else 1
        assert terms.align[row].item() == pytest.approx(align / count, abs=1e-5)
        assert terms.pair[row].item() == pytest.approx(pair / count, abs=1e-5)


def test_the_gradient_draws_the_picture_to_its_caption() -> None:
    image, caption = draw(0).requires_grad_(), draw(1)
    terms = guide_terms(image, caption, draw(2))
    (terms.align.sum() + terms.pair.sum()).backward()
    assert image.grad is not None
    moved = guide_terms((image - 0.1 * image.grad).detach(), caption, draw(2))
    assert (moved.cosine > terms.cosine).all()


@pytest.mark.parametrize("empty", ["image", "caption", "retrieved"])
@pytest.mark.parametrize("form", ["paper", "repository"])
def test_empty_spans_give_zero_and_no_nan(form: str, empty: str) -> None:
    given = {"image": draw(0), "caption": draw(1), "retrieved": draw(2)}
    full = guide_terms(**given, form=form)
    given[empty][:, 1] = 0.0
    leaves = {name: value.requires_grad_() for name, value in given.items()}
    terms = guide_terms(**leaves, form=form)
    (terms.align.sum() + terms.pair.sum()).backward()
    assert terms.pair[1] == 0
    assert not terms.is_paired[1]
    assert bool(terms.is_aligned[1]) == (empty == "retrieved")
    assert (terms.align[1] == 0) == (empty != "retrieved")
    others = [0, 2, 3]
    torch.testing.assert_close(terms.align[others], full.align[others])
    torch.testing.assert_close(terms.pair[others], full.pair[others])
    for leaf in leaves.values():
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()


def test_what_all_states_share_counts_for_nothing_when_centred() -> None:
    shared = 100.0 * torch.ones(LAYERS, 1, HIDDEN)
    own = [draw(seed) for seed in range(3)]
    moved = [shared + state for state in own]
    raw, hidden = guide_terms(*own), guide_terms(*moved)
    assert (hidden.cosine > 0.99).all()
    assert (raw.cosine < 0.99).all()
    centred, centred_moved = (guide_terms(*given, centre="captions") for given in (own, moved))
    torch.testing.assert_close(centred_moved.align, centred.align, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(centred_moved.pair, centred.pair, atol=1e-3, rtol=1e-3)
    mean = own[1].mean(dim=1)
    near = [cosine(own[0][layer, 2] - mean[layer], own[1][layer, 2] - mean[layer])
            for layer in range(LAYERS)]  # fmt: skip
    assert centred.align[2].item() == pytest.approx(-sum(near) / LAYERS, abs=1e-5)


def test_equal_captions_have_no_direction_from_their_mean() -> None:
    image, retrieved = draw(0).requires_grad_(), draw(2)
    caption = draw(1)[:, :1].expand(-1, BATCH, -1)
    terms = guide_terms(image, caption, retrieved, centre="captions")
    (terms.align.sum() + terms.pair.sum()).backward()
    assert not terms.is_aligned.any()
    assert not terms.is_paired.any()
    assert terms.align.eq(0).all()
    assert image.grad is not None
    assert image.grad.eq(0).all()


@pytest.mark.parametrize("empty", ["image", "caption", "retrieved"])
def test_an_empty_span_stays_empty_when_centred(empty: str) -> None:
    given = {"image": draw(0), "caption": draw(1), "retrieved": draw(2)}
    given[empty][:, 1] = 0.0
    leaves = {name: value.requires_grad_() for name, value in given.items()}
    terms = guide_terms(**leaves, centre="captions")
    (terms.align.sum() + terms.pair.sum()).backward()
    assert terms.pair[1] == 0
    assert not terms.is_paired[1]
    assert bool(terms.is_aligned[1]) == (empty == "retrieved")
    for leaf in leaves.values():
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()


def test_without_retrieved_texts_there_is_no_pair_term() -> None:
    terms = guide_terms(draw(0), draw(1), None)
    assert not terms.is_paired.any()
    assert terms.pair.eq(0).all()
    assert terms.align.ne(0).all()


def test_weights_of_the_repository_fall_to_zero() -> None:
    end = guide_terms(draw(0), draw(1), draw(2), form="repository", progress=1.0)
    assert end.align.eq(0).all()
    assert end.pair.eq(0).all()


def test_pooling_is_the_mean_over_the_span_alone() -> None:
    hidden = torch.randn(2, 4, 3, dtype=torch.bfloat16)
    span = torch.tensor([[True, False, True, False], [False] * 4])
    pooled = pool_span(hidden, span)
    torch.testing.assert_close(pooled[0], hidden[0, [0, 2]].float().mean(dim=0))
    assert pooled[1].eq(0).all()


def test_padding_cannot_enter_a_mean_whatever_it_holds() -> None:
    hidden = torch.randn(1, 3, 2)
    span = torch.tensor([[True, True, False]])
    expected = pool_span(hidden, span)
    hidden[0, 2] = torch.inf
    torch.testing.assert_close(pool_span(hidden, span), expected)


def test_pooling_the_last_token_takes_the_last_of_the_span() -> None:
    hidden = torch.randn(2, 4, 3)
    span = torch.tensor([[True, True, False, False], [False, False, False, False]])
    pooled = pool_span(hidden, span, pooling="last")
    torch.testing.assert_close(pooled[0], hidden[0, 1])
    assert pooled[1].eq(0).all()


def test_answers_are_predicted_by_the_position_before() -> None:
    logits, labels = torch.randn(1, 4, 6), torch.tensor([[-100, -100, 3, 5]])
    shares = logits.log_softmax(-1)
    expected = -(shares[0, 1, 3] + shares[0, 2, 5]) / 2
    torch.testing.assert_close(answer_cross_entropy(logits, labels), expected)


def test_batches_hold_each_sample_once_and_one_group() -> None:
    groups = [number % 3 for number in range(50)]
    lengths = torch.randint(1, 99, (50,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = build_batches(lengths, groups, 4, seed=1)
    assert sorted(index for batch in batches for index in batch) == list(range(50))
    assert all(len({groups[index] for index in batch}) == 1 for batch in batches)
    assert batches == build_batches(lengths, groups, 4, seed=1)
    assert batches != build_batches(lengths, groups, 4, seed=2)
