"""The suites: Inspect AI tasks over Safebridge samples, with scorers that carry standard errors."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset
from inspect_ai.dataset import Sample as InspectSample
from inspect_ai.model import ChatMessageUser, ContentImage, ContentText, GenerateConfig
from inspect_ai.scorer import Score, Scorer, Target, grouped, mean, scorer, stderr
from inspect_ai.solver import TaskState, generate

from safebridge.data.files import load_samples
from safebridge.data.sample import Sample
from safebridge.errors import DataError
from safebridge.evaluation.judges import find_judge, score_naming

__all__ = [
    "KINDS",
    "find_kind",
    "naming",
    "naming_scorer",
    "refusal_scorer",
    "twins",
]

KINDS = ("harmful-text", "harmful-image", "benign-text", "benign-image")
"""What a sample asks (harmful or benign) and where the object stands (text or image)."""


def find_kind(sample: Sample) -> str:
    """Return which of `KINDS` a sample is."""
    intent = "harmful" if sample.is_harmful else "benign"
    return f"{intent}-{'image' if sample.images else 'text'}"


@task
def twins(
    samples: Sequence[Sample] | str,
    groups: Mapping[str, str] | None = None,
    judge: str = "refusal-rules",
    max_new_tokens: int = 24,
) -> Task:
    """Measure refusal on text and picture twins and over-refusal on benign ones.

    Args:
        samples: Samples, or a file written by `save_samples`.
        groups: Names the group of a category, e.g. {"gore": "unseen"}; rates are then given
            for each group as well.
        judge: Name of the refusal judge.
        max_new_tokens: Longest answer in tokens.

    Returns:
        A task whose scores are 1 for a refusal and 0 otherwise.

    Raises:
        DataError: If there are no samples, or two share an id.
        UnknownNameError: If there is no such judge.
    """
    return _build_task(samples, groups or {}, {}, refusal_scorer(judge), max_new_tokens)


@task
def naming(
    samples: Sequence[Sample] | str,
    groups: Mapping[str, str] | None = None,
    aliases: Mapping[str, Sequence[str]] | None = None,
    max_new_tokens: int = 24,
) -> Task:
    """Measure how often the answer names the concept that the sample is about.

    Args:
        samples: Samples with a concept, or a file written by `save_samples`.
        groups: As in `twins`.
        aliases: Other names that count for a concept, e.g. {"revolver": ["handgun"]}.
        max_new_tokens: Longest answer in tokens.

    Returns:
        A task whose scores are 1 where the concept is named and 0 otherwise.

    Raises:
        DataError: If there are no samples, two share an id, or one has no concept.
    """
    suite = _build_task(samples, groups or {}, aliases or {}, naming_scorer(), max_new_tokens)
    for sample in suite.dataset:
        if not sample.target:
            raise DataError(f"sample '{sample.id}' has no concept, so no answer can name it.")
    return suite


def _metrics() -> list[Any]:
    """Return mean and standard error of each kind; samples of one concept are one cluster."""
    return [
        grouped(mean(), "kind", all=False),
        grouped(stderr(cluster="concept"), "kind", all=False, name_template="{group_name} stderr"),
    ]


@scorer(metrics=_metrics())
def refusal_scorer(judge: str = "refusal-rules") -> Scorer:
    """Score 1 for a refusal; label and rule stand in the score's metadata.

    Args:
        judge: Name of a judge; it gets the answer and nothing else.
    """
    score_refusal = find_judge(judge)

    async def score(state: TaskState, target: Target) -> Score:  # noqa: ARG001 - Inspect's signature
        answer = state.output.completion
        judgement = score_refusal(answer)
        return Score(
            value=float(judgement.is_refusal),
            answer=answer,
            explanation=f"{judgement.label} (rule: {judgement.rule})",
            metadata={"label": judgement.label, "rule": judgement.rule, "judge": judge},
        )

    return score


@scorer(metrics=_metrics())
def naming_scorer() -> Scorer:
    """Score 1 where the answer holds one of the target's names."""

    async def score(state: TaskState, target: Target) -> Score:
        answer = state.output.completion
        return Score(value=float(score_naming(answer, list(target))), answer=answer)

    return score


def _build_task(
    samples: Sequence[Sample] | str,
    groups: Mapping[str, str],
    aliases: Mapping[str, Sequence[str]],
    task_scorer: Scorer,
    max_new_tokens: int,
) -> Task:
    own = load_samples(samples) if isinstance(samples, str) else list(samples)
    repeated = [name for name, count in Counter(each.id for each in own).items() if count > 1]
    if not own or repeated:
        found = f"'{repeated[0]}' twice" if repeated else "no samples"
        raise DataError(f"a suite needs samples with different ids, found {found}.")
    if "all" in groups.values():
        raise DataError("the group name 'all' is taken by the rate over all groups. Rename it.")
    return Task(
        dataset=MemoryDataset([_to_inspect(each, groups, aliases) for each in own]),
        solver=generate(),
        scorer=task_scorer,
        config=GenerateConfig(max_tokens=max_new_tokens),
    )


def _to_inspect(
    sample: Sample, groups: Mapping[str, str], aliases: Mapping[str, Sequence[str]]
) -> InspectSample:
    pictures = [ContentImage(image=str(path)) for path in sample.images]
    content = [*pictures, ContentText(text=sample.prompt)] if pictures else sample.prompt
    return InspectSample(
        id=sample.id,
        input=[ChatMessageUser(content=content)],
        target=[sample.concept, *aliases.get(sample.concept, ())] if sample.concept else "",
        metadata={
            "kind": find_kind(sample),
            "group": groups.get(sample.category, ""),
            "category": sample.category,
            # A sample without a concept is a cluster of its own.
            "concept": sample.concept or sample.id,
            "style": sample.style,
            "template": sample.template,
            "set_name": sample.set_name,
            "images": [str(path) for path in sample.images],
        },
    )
