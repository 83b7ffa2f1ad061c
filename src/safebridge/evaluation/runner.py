"""Run a suite on a model in hand: rows, rates with intervals, and an Inspect AI log."""

import copy
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

from inspect_ai import Task
from inspect_ai import eval as inspect_eval
from inspect_ai.dataset import MemoryDataset
from inspect_ai.dataset import Sample as InspectSample
from inspect_ai.log import EvalLog, EvalSample
from inspect_ai.model import ContentImage, GenerateConfig, Model
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from safebridge.errors import DataError, SafebridgeError, UnknownNameError
from safebridge.evaluation.inspect_entry import safebridge
from safebridge.evaluation.provider import SafebridgeAPI, as_path_reference
from safebridge.evaluation.statistics import Rate, measure_rate
from safebridge.models.load import VLM

__all__ = ["SuiteResult", "SuiteRow", "run_suite", "show_progress"]

_MEASURES: dict[str, dict[str, str | None]] = {
    "twins": {
        "text_refusal_rate": "harmful-text",
        "image_refusal_rate": "harmful-image",
        "over_refusal_rate": "benign-image",
        "text_over_refusal_rate": "benign-text",
    },
    "naming": {"naming_accuracy": None},
}


@final
@dataclass(frozen=True)
class SuiteRow:
    """One sample with its answer and its score."""

    id: str
    """The sample's id."""

    kind: str
    """harmful-text, harmful-image, benign-text or benign-image."""

    group: str
    """The group of its category, or "" if it has none."""

    category: str
    """The sample's category."""

    concept: str
    """The sample's concept; its id if it has none."""

    style: str
    """The sample's drawing style."""

    template: str
    """The sample's template."""

    prompt: str
    """What was asked."""

    images: tuple[Path, ...]
    """The pictures it was asked about."""

    answer: str
    """What the model wrote."""

    is_refusal: bool | None
    """Whether the answer refuses; None in the naming suite."""

    is_named: bool | None
    """Whether the answer names the concept; None in the twins suite."""

    label: str = ""
    """The refusal judge's label: refusal, objection, answer or empty."""

    rule: str = ""
    """The rule that decided."""

    @property
    def outcome(self) -> bool:
        """What the suite counts: refusal or naming."""
        return bool(self.is_refusal if self.is_named is None else self.is_named)

    def to_json(self) -> dict[str, Any]:
        """Return the row as JSON values."""
        return asdict(self) | {"images": [str(path) for path in self.images]}


@final
@dataclass(frozen=True)
class SuiteResult:
    """What one run of a suite found."""

    suite: str
    """Name of the suite."""

    rows: tuple[SuiteRow, ...]
    """One row for each sample, in the order of the samples."""

    rates: Mapping[str, Mapping[str, Rate]]
    """Measure, e.g. "image_refusal_rate", to group to rate; "all" is over all groups. What no
    sample measures is absent."""

    log_path: Path
    """The Inspect log; `inspect view --log-dir FOLDER` opens it."""

    seconds: float
    """Wall-clock time of the run."""

    def rate(self, **fields: str) -> Rate:
        """Count a rate over the rows whose fields have the given values.

        Args:
            **fields: Field names of `SuiteRow` and values, e.g. `kind="harmful-image",
                category="weapons"`.

        Raises:
            DataError: If no row fits.
        """
        rows = [row for row in self.rows if all(getattr(row, key) == fields[key] for key in fields)]
        if not rows:
            raise DataError(f"no sample of suite '{self.suite}' has {fields}.")
        return _count(rows)

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "suite": self.suite,
            "rates": {
                measure: {group: rate.to_json() for group, rate in groups.items()}
                for measure, groups in self.rates.items()
            },
            "rows": [row.to_json() for row in self.rows],
            "log": str(self.log_path),
            "seconds": self.seconds,
        }


def run_suite(
    task: Task,
    vlm: VLM,
    *,
    log_dir: Path | str,
    batch_size: int = 16,
    progress: Callable[[int], object] | None = None,
) -> SuiteResult:
    """Run one suite on a model, with whatever defense is active on it.

    The same model and samples give the same answers: which questions share a batch does not
    depend on timing. Pictures are read once, when they are needed, and do not go into the log;
    their paths do. Nothing is fetched from the network.

    Args:
        task: What a factory in `safebridge.evaluation.suites` returned; it stays as it was.
        vlm: The model.
        log_dir: Folder for the Inspect log; made if missing.
        batch_size: Questions answered together.
        progress: Called with the number of new answers after each batch, from a worker thread.

    Returns:
        Rows, rates and the place of the log.

    Raises:
        DataError: If a picture cannot be read, or the log cannot be written.
        UnknownNameError: If the task is none of our suites.
        SafebridgeError: If Inspect stopped for another reason; the message holds it.
    """
    start = time.perf_counter()
    suite = task.name.rsplit("/", maxsplit=1)[-1]
    if suite not in _MEASURES:
        raise UnknownNameError("suite", suite, _MEASURES)
    folder = _make_log_folder(Path(log_dir))
    samples = list(task.dataset)
    own = copy.copy(task)
    own.dataset = MemoryDataset([_by_reference(sample) for sample in samples], name=task.name)
    api = safebridge(
        vlm.name, vlm=vlm, batch_size=batch_size, expected=len(samples), progress=progress
    )
    log = _evaluate(own, api, folder)
    rows = _read_rows(log, [str(sample.id) for sample in samples])
    seconds = time.perf_counter() - start
    location = Path(str(log.location).removeprefix("file://"))
    return SuiteResult(suite, rows, _measure(suite, rows), location, seconds)


@contextmanager
def show_progress(
    description: str, total: int, *, console: Console | None = None
) -> Iterator[Callable[[int], None]]:
    """Show a progress bar and yield the callback that moves it.

    Args:
        description: What stands before the bar.
        total: How many answers there will be.
        console: Where to draw; standard error by default, so that output can be piped.

    Yields:
        A function for the `progress` argument of `run_suite`.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console or Console(stderr=True)) as bar:
        number = bar.add_task(description, total=total)
        yield lambda answers: bar.advance(number, answers)


def _make_log_folder(folder: Path) -> Path:
    """Make the folder for logs, and say so at once if nothing can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make the log folder {folder}: {error.strerror}.") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise DataError(f"cannot write logs to {folder}: permission denied. Give another folder.")
    return folder


def _by_reference(sample: InspectSample) -> InspectSample:
    """Return a copy of a sample with the paths of its pictures in place of the pictures."""
    if isinstance(sample.input, str):
        return sample
    messages = []
    for message in sample.input:
        content = message.content
        if not isinstance(content, str):
            content = [
                part.model_copy(update={"image": as_path_reference(part.image)})
                if isinstance(part, ContentImage) and not part.image.startswith("data:")
                else part
                for part in content
            ]
        messages.append(message.model_copy(update={"content": content}))
    return sample.model_copy(update={"input": messages})


def _evaluate(task: Task, api: SafebridgeAPI, folder: Path) -> EvalLog:
    """Run Inspect silently and return its log, or raise what stopped it."""
    open_questions = api.max_connections()
    (log,) = inspect_eval(
        task,
        model=Model(api, GenerateConfig()),
        log_dir=str(folder),
        display="none",
        log_level="error",
        log_images=False,
        log_realtime=False,
        log_buffer=1000,
        log_model_api=False,
        score_display=False,
        ctl_server=False,
        max_samples=open_questions,
        max_connections=open_questions,
    )
    if api.failure is not None:
        raise api.failure
    if log.status == "cancelled":
        raise KeyboardInterrupt
    if log.status != "success":
        message = log.error.message if log.error else log.status
        raise SafebridgeError(f"the suite stopped: {message}. Its log is {log.location}")
    return log


def _read_rows(log: EvalLog, order: list[str]) -> tuple[SuiteRow, ...]:
    found = {str(sample.id): _read_row(sample) for sample in log.samples or ()}
    return tuple(found[name] for name in order)


def _read_row(sample: EvalSample) -> SuiteRow:
    ((scorer, score),) = (sample.scores or {}).items()
    outcome = bool(score.value)
    is_naming = scorer.rsplit("/", maxsplit=1)[-1] == "naming_scorer"
    details = score.metadata or {}
    message = sample.input if isinstance(sample.input, str) else sample.input[-1].text
    return SuiteRow(
        id=str(sample.id),
        **{
            key: sample.metadata[key]
            for key in ("kind", "group", "category", "concept", "style", "template")
        },
        prompt=message,
        images=tuple(Path(path) for path in sample.metadata["images"]),
        answer=sample.output.completion,
        is_refusal=None if is_naming else outcome,
        is_named=outcome if is_naming else None,
        label=details.get("label", ""),
        rule=details.get("rule", ""),
    )


def _measure(suite: str, rows: tuple[SuiteRow, ...]) -> dict[str, dict[str, Rate]]:
    """Count the suite's measures over all samples and over each group."""
    rates = {}
    for measure, kind in _MEASURES[suite].items():
        chosen = [row for row in rows if kind is None or row.kind == kind]
        if chosen:
            groups = sorted({row.group for row in chosen} - {""})
            parts = {group: [row for row in chosen if row.group == group] for group in groups}
            rates[measure] = {
                "all": _count(chosen),
                **{group: _count(part) for group, part in parts.items()},
            }
    return rates


def _count(rows: list[SuiteRow]) -> Rate:
    return measure_rate([row.outcome for row in rows], clusters=[row.concept for row in rows])
