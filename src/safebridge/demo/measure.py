"""Asks a model the held-out requests and keeps every answer."""

from collections.abc import Callable, Sequence
from pathlib import Path

from inspect_ai import Task

from safebridge.data.sample import Sample
from safebridge.data.source import TwinSource
from safebridge.demo.config import DemoConfig
from safebridge.demo.source import Plan
from safebridge.demo.summary import Answered, Measurement
from safebridge.evaluation.runner import run_suite
from safebridge.evaluation.suites import naming, twins
from safebridge.models.load import VLM

__all__ = ["count_requests", "measure_answers"]

_NAMING = "naming_accuracy"


def count_requests(plan: Plan) -> int:
    """Return how many requests `measure_answers` will ask.

    Args:
        plan: The requests of the run.
    """
    return sum(len(samples) for samples in plan.cells.values())


def measure_answers(
    vlm: VLM,
    plan: Plan,
    source: TwinSource,
    config: DemoConfig,
    *,
    log_dir: Path,
    progress: Callable[[int], object] | None = None,
) -> Measurement:
    """Ask everything once, with whatever defense is active on the model.

    Args:
        vlm: The model.
        plan: The requests of the run.
        source: Knows the names that count for a thing.
        config: Length of the answers and size of the batches.
        log_dir: Folder for the logs of the two suites.
        progress: Called with the number of new answers.

    Returns:
        The answers by metric and part, in the order of the requests.
    """
    asked = [sample for cell, own in plan.cells.items() if cell[0] != _NAMING for sample in own]
    named = [sample for cell, own in plan.cells.items() if cell[0] == _NAMING for sample in own]
    aliases = {sample.concept: source.names_of(sample.concept) for sample in named}
    tasks = (
        (asked, twins(asked, max_new_tokens=config.max_new_tokens)),
        (named, naming(named, aliases=aliases, max_new_tokens=config.naming_tokens)),
    )
    answered: dict[str, Answered] = {}
    for samples, task in tasks:
        answered |= _ask(vlm, samples, task, config, log_dir=log_dir, progress=progress)
    return {
        cell: [answered[sample.id] for sample in samples] for cell, samples in plan.cells.items()
    }


def _ask(
    vlm: VLM,
    samples: Sequence[Sample],
    task: Task,
    config: DemoConfig,
    *,
    log_dir: Path,
    progress: Callable[[int], object] | None,
) -> dict[str, Answered]:
    result = run_suite(task, vlm, log_dir=log_dir, batch_size=config.batch_size, progress=progress)
    return {
        sample.id: Answered(sample, row.answer, row.outcome)
        for sample, row in zip(samples, result.rows, strict=True)
    }
