from pathlib import Path

from safebridge.data.source import TwinSource
from safebridge.demo.config import DemoConfig
from safebridge.demo.measure import count_requests, measure_answers
from safebridge.demo.source import choose_samples
from safebridge.evaluation.judges import score_naming, score_refusal
from safebridge.models.generate import generate_answers
from safebridge.testing.tiny import tiny_vlm

CONFIG = DemoConfig(
    harmful_samples=4,
    benign_samples=3,
    naming_samples=3,
    max_new_tokens=5,
    naming_tokens=4,
    batch_size=4,
    fit_harmful=4,
    fit_twins=4,
    fit_general=2,
)


def test_the_fit_and_the_test_share_no_picture_and_no_unseen_category(twins: TwinSource) -> None:
    plan = choose_samples(twins, CONFIG)
    fitted = [*plan.harmful, *plan.twins, *plan.general]
    measured = [sample for own in plan.cells.values() for sample in own]
    assert not {path for one in fitted for path in one.images} & {
        path for one in measured for path in one.images
    }
    assert all(twins.is_seen(sample.category) for sample in plan.harmful)
    assert all(sample.is_harmful for sample in plan.harmful)
    assert not any(sample.is_harmful for sample in [*plan.twins, *plan.general])


def test_every_request_is_asked_once_and_judged(twins: TwinSource, tmp_path: Path) -> None:
    plan = choose_samples(twins, CONFIG)
    vlm = tiny_vlm("llava")
    moved: list[int] = []
    found = measure_answers(
        vlm, plan, twins, CONFIG, log_dir=tmp_path / "logs", progress=moved.append
    )
    assert sum(moved) == count_requests(plan) == 4 * 4 + 2 * 3 + 3
    assert {cell: [row.sample for row in rows] for cell, rows in found.items()} == dict(plan.cells)
    for (metric, _), rows in found.items():
        for row in rows:
            wanted = (
                score_naming(row.answer, twins.names_of(row.sample.concept))
                if metric == "naming_accuracy"
                else score_refusal(row.answer).is_refusal
            )
            assert row.is_hit == wanted
    assert len(list((tmp_path / "logs").iterdir())) == 2
    first = found["text_refusal_rate", "seen"][0]
    alone = generate_answers(vlm, [first.sample.prompt], [[]], max_new_tokens=5)
    assert first.answer == alone[0]
