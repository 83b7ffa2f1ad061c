"""Whether: how often each way of putting a request is refused, and what the differences are."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safebridge.analysis.spelled_pictures import answer_spelled
from safebridge.data.sample import Sample
from safebridge.diagnosis.config import CONDITIONS, SPELLED, DiagnosisConfig
from safebridge.diagnosis.plan import Case
from safebridge.diagnosis.results import Record, Reply
from safebridge.evaluation.calibration import load_judge_error
from safebridge.evaluation.judges import score_refusal
from safebridge.evaluation.runner import run_suite
from safebridge.evaluation.statistics import (
    ErrorRates,
    Rate,
    adjust_p_values,
    correct_rate,
    measure_difference,
    measure_rate,
)
from safebridge.evaluation.suites import twins
from safebridge.models.load import VLM

__all__ = ["Replies", "ask_cases", "load_error_rates", "measure_refusals"]

Replies = Mapping[str, Sequence[Reply]]
"""Condition to one reply for each case, in the order of the cases."""


def ask_cases(
    vlm: VLM,
    cases: Sequence[Case],
    conditions: Sequence[str],
    config: DiagnosisConfig,
    *,
    log_dir: Path,
    progress: Callable[[int], object] | None = None,
) -> dict[str, list[Reply]]:
    """Ask everything once, with whatever defense is active on the model.

    Args:
        vlm: The model.
        cases: The requests.
        conditions: Which ways of putting them.
        config: Length of the answers and size of the batches.
        log_dir: Folder for the log.
        progress: Called with the number of new answers.

    Returns:
        One reply for each case by condition.
    """
    plain = [name for name in conditions if name != SPELLED]
    asked: list[Sample] = [case.samples[name] for name in plain for case in cases]
    result = run_suite(
        twins(asked, max_new_tokens=config.max_new_tokens),
        vlm,
        log_dir=log_dir,
        batch_size=config.batch_size,
        progress=progress,
    )
    replies = [Reply(row.answer, row.label, row.rule) for row in result.rows]
    found = {
        name: replies[number * len(cases) : (number + 1) * len(cases)]
        for number, name in enumerate(plain)
    }
    if SPELLED in conditions:
        found[SPELLED] = _ask_spelled(vlm, cases, config)
        if progress is not None:
            progress(len(cases))
    return {name: found[name] for name in conditions}


def _ask_spelled(vlm: VLM, cases: Sequence[Case], config: DiagnosisConfig) -> list[Reply]:
    """Ask beside pictures whose tokens spell what they show; these answers are in no log."""
    answers = answer_spelled(
        vlm,
        [case.samples[SPELLED] for case in cases],
        [case.concept for case in cases],
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
    )
    judged = map(score_refusal, answers)
    return [Reply(own, one.label, one.rule) for own, one in zip(answers, judged, strict=True)]


def load_error_rates() -> ErrorRates:
    """Return the default judge's error on short answers, as people labelled them."""
    named = {entry["name"]: entry for entry in load_judge_error()["measurements"]}
    entry: Mapping[str, Any] = named["xstest-full-short"]
    return ErrorRates(
        recall=Rate.from_json(entry["recall"]),
        false_alarm_rate=Rate.from_json(entry["false_alarm_rate"]),
    )


def measure_refusals(
    variant: str, cases: Sequence[Case], replies: Replies, config: DiagnosisConfig
) -> list[Record]:
    """Count refusals and compare every condition with plain text on the same requests.

    Args:
        variant: "base", or the name of a defense.
        cases: The requests.
        replies: The answers to them; those in plain text are needed for the differences.
        config: Split and seed.

    Returns:
        `refusal_rate`, `compliance_rate` and `refusal_rate_corrected` of harmful requests, the
        first by category as well; `over_refusal_rate` of harmless ones; `refusal_gap` and
        `over_refusal_gap`, text minus the condition, with McNemar's test before and after Holm.
    """
    records: list[Record] = []
    for condition, own in replies.items():
        rows = list(zip(cases, own, strict=True))
        harmful = [row for row in rows if row[0].is_harmful]
        harmless = [row for row in rows if not row[0].is_harmful]
        make = _maker(variant, condition, config)
        records.append(make("refusal_rate", *_refused(harmful)))
        records.append(make("compliance_rate", *_complied(harmful)))
        records.append(make("over_refusal_rate", *_refused(harmless)))
        records.append(_corrected(make, harmful, config))
        for category in sorted({case.category for case, _ in harmful}):
            part = [row for row in harmful if row[0].category == category]
            records.append(make("refusal_rate", *_refused(part), category=category))
    for metric, is_harmful in (("refusal_gap", True), ("over_refusal_gap", False)):
        records += _compare(variant, metric, cases, replies, config, is_harmful=is_harmful)
    return records


Row = tuple[Case, Reply]
Maker = Callable[..., Record]


def _maker(variant: str, condition: str, config: DiagnosisConfig) -> Maker:
    def make(
        metric: str, outcomes: Sequence[bool], clusters: Sequence[str], *, category: str = ""
    ) -> Record:
        rate = measure_rate(outcomes, clusters=clusters)
        return Record(
            variant=variant,
            setting=condition,
            metric=metric,
            split=config.split,
            seeds=(config.seed,),
            category=category,
            value=rate.value,
            low=rate.low,
            high=rate.high,
            n=rate.n,
        )

    return make


def _refused(rows: Sequence[Row]) -> tuple[list[bool], list[str]]:
    return [reply.is_refusal for _, reply in rows], [case.concept for case, _ in rows]


def _complied(rows: Sequence[Row]) -> tuple[list[bool], list[str]]:
    return [reply.is_compliance for _, reply in rows], [case.concept for case, _ in rows]


def _corrected(make: Maker, rows: Sequence[Row], config: DiagnosisConfig) -> Record:
    outcomes, clusters = _refused(rows)
    found = correct_rate(outcomes, load_error_rates(), clusters=clusters, seed=config.seed)
    plain = make("refusal_rate_corrected", outcomes, clusters)
    return Record(**(vars(plain) | found.to_json()))


def _compare(
    variant: str,
    metric: str,
    cases: Sequence[Case],
    replies: Replies,
    config: DiagnosisConfig,
    *,
    is_harmful: bool,
) -> list[Record]:
    """Compare plain text with every other condition, on the same requests."""
    if "text" not in replies:
        return []
    chosen = [number for number, case in enumerate(cases) if case.is_harmful == is_harmful]
    clusters = [cases[number].concept for number in chosen]
    sides = {name: [own[number].is_refusal for number in chosen] for name, own in replies.items()}
    others = [name for name in CONDITIONS if name in replies and name != "text"]
    found = [measure_difference(sides[name], sides["text"], clusters=clusters) for name in others]
    adjusted = adjust_p_values([difference.p_value for difference in found])
    return [
        Record(
            variant=variant,
            setting=name,
            metric=metric,
            split=config.split,
            value=difference.value,
            low=difference.low,
            high=difference.high,
            n=difference.n,
            seeds=(config.seed,),
            p_value=difference.p_value,
            p_adjusted=p_adjusted,
        )
        for name, difference, p_adjusted in zip(others, found, adjusted, strict=True)
    ]
