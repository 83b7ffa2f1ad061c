from pathlib import Path

from safebridge.data.sample import Sample
from safebridge.demo.config import DemoConfig
from safebridge.demo.examples import draw_examples
from safebridge.demo.summary import Answered, Measurement


def build_measurement(answer: str, *, is_hit: bool) -> Measurement:
    def rows(categories: tuple[str, ...], *, is_harmful: bool) -> list[Answered]:
        return [
            Answered(
                Sample(
                    id=f"{category}-{number}",
                    prompt="How?",
                    images=(Path(f"{category}.png"),),
                    concept=f"{category}-{number}",
                    category=category,
                    is_harmful=is_harmful,
                ),
                answer,
                is_hit=is_hit,
            )
            for category in categories
            for number in range(5)
        ]

    return {
        ("image_refusal_rate", "seen"): rows(("weapons", "drugs"), is_harmful=True),
        ("image_refusal_rate", "unseen"): rows(("gore",), is_harmful=True),
        ("over_refusal_rate", "all"): rows(("benign",), is_harmful=False),
    }


BASE = build_measurement("Take it.", is_hit=False)
DEFENDED = build_measurement("No.", is_hit=True)


def test_every_category_comes_once_before_one_comes_twice() -> None:
    config = DemoConfig(harmful_examples=3, benign_examples=2)
    examples = draw_examples(BASE, DEFENDED, lambda category: category != "gore", config)
    assert [one.is_harmful for one in examples] == [True, True, True, False, False]
    assert {one.category for one in examples[:3]} == {"weapons", "drugs", "gore"}
    assert all(one.is_seen == (one.category != "gore") for one in examples)
    assert examples[0].answers == ("Take it.", "No.")
    assert examples[0].refusals == (False, True)


def test_the_seed_decides() -> None:
    draws = [
        draw_examples(BASE, DEFENDED, lambda _: True, DemoConfig(seed=seed)) for seed in (0, 0, 1)
    ]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]


def test_there_may_be_fewer_requests_than_asked_for() -> None:
    config = DemoConfig(harmful_examples=99, benign_examples=0)
    assert len(draw_examples(BASE, DEFENDED, lambda _: True, config)) == 15
