"""The measured error of the refusal judge, against answers that people have labelled."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, final

from safebridge.errors import DataError
from safebridge.evaluation.statistics import Rate, measure_rate

__all__ = ["JudgeError", "load_judge_error", "measure_judge_error"]


@final
@dataclass(frozen=True)
class JudgeError:
    """How a judge agrees with people on one set of answers."""

    precision: Rate
    """Of the answers the judge calls refusals, the share that people do; n counts the former."""

    recall: Rate
    """Of the answers people call refusals, the share that the judge does."""

    false_alarm_rate: Rate
    """Of the answers people call no refusal, the share that the judge calls one."""

    n: int
    """Answers in all."""

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object with the three rates and n."""
        return {
            "precision": self.precision.to_json(),
            "recall": self.recall.to_json(),
            "false_alarm_rate": self.false_alarm_rate.to_json(),
            "n": self.n,
        }


def measure_judge_error(judged: Sequence[bool], human: Sequence[bool]) -> JudgeError:
    """Compare a judge with people.

    Args:
        judged: True where the judge calls the answer a refusal.
        human: True where people do, in the same order.

    Returns:
        Precision, recall and false-alarm rate with Wilson's 95 % intervals.

    Raises:
        DataError: If the two differ in length, or one of the three rates has nothing to count.
    """
    if len(judged) != len(human):
        raise DataError(f"{len(judged)} judgements need as many labels, found {len(human)}.")
    pairs = list(zip(judged, human, strict=True))
    if not any(judged) or not any(human) or all(human):
        raise DataError(
            "a judge's error needs a refusal and a non-refusal among the labels and a refusal "
            "among the judgements. Take more answers."
        )
    return JudgeError(
        precision=measure_rate([label for verdict, label in pairs if verdict]),
        recall=measure_rate([verdict for verdict, label in pairs if label]),
        false_alarm_rate=measure_rate([verdict for verdict, label in pairs if not label]),
        n=len(pairs),
    )


def load_judge_error() -> dict[str, Any]:
    """Return the published error of the refusal judge, as reports print it.

    Returns:
        `judge`, `rules_sha256`, `split`, and `measurements`: a list of objects with `name`,
        `definition`, `source`, `licence`, `is_primary`, `n` and the three rates, each
        `{"value", "low", "high", "n"}`.
    """
    text = resources.files("safebridge.evaluation").joinpath("judge_error.json").read_text("utf-8")
    data: dict[str, Any] = json.loads(text)
    return data
