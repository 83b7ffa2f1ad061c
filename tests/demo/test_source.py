from collections import Counter

from safebridge.data import twins as shipped_twins
from safebridge.data.source import TwinSource
from safebridge.demo.config import FAST, DemoConfig
from safebridge.demo.source import choose_samples


def test_the_shipped_twins_are_a_source() -> None:
    assert isinstance(shipped_twins, TwinSource)


def test_harmless_requests_of_the_fit_are_worded_like_the_harmful_ones() -> None:
    plan = choose_samples(shipped_twins, FAST)
    assert len(plan.harmful) == FAST.fit_harmful
    harmful, twins = (Counter((one.prompt, one.style) for one in own)
                      for own in (plan.harmful, plan.twins))  # fmt: skip
    assert harmful == twins
    assert len({one.concept for one in plan.twins}) == FAST.fit_twins


def test_more_twins_than_harmful_requests_keep_the_wordings() -> None:
    plan = choose_samples(shipped_twins, DemoConfig(fit_harmful=3, fit_twins=7))
    wordings = {one.prompt for one in plan.harmful}
    assert len(plan.twins) == 7
    assert {one.prompt for one in plan.twins} == wordings


def test_the_shipped_plan_keeps_fit_and_test_apart() -> None:
    plan = choose_samples(shipped_twins, DemoConfig())
    fitted = [*plan.harmful, *plan.twins]
    measured = [sample for own in plan.cells.values() for sample in own]
    assert not {one.template for one in fitted} & {one.template for one in measured}
    assert not {one.style for one in fitted} & {one.style for one in measured if one.style}
    assert all(shipped_twins.is_seen(one.category) for one in fitted)
    assert not any(
        shipped_twins.is_seen(one.category) for one in plan.cells["image_refusal_rate", "unseen"]
    )
    for cell, samples in plan.cells.items():
        assert samples, cell
        assert len({one.id for one in samples}) == len(samples)


def test_a_seed_draws_the_same_requests_again() -> None:
    first, again = (choose_samples(shipped_twins, FAST) for _ in range(2))
    assert first == again
    assert choose_samples(shipped_twins, DemoConfig(seed=1)).twins != first.twins
