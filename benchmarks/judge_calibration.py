"""Measure the refusal judge against human labels and write its error and rule table down.

    python benchmarks/judge_calibration.py --data ../shared/data/judge_calibration

It takes two seconds and writes `src/safebridge/evaluation/judge_error.json` and the two generated
parts of `docs/judges.md`. The rules were developed on one half of the prompts; what is measured
here is the other half. Every answer to a prompt, and its text and picture twin, is in the same
half. No text of the data sets is written anywhere.
"""

import argparse
import csv
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safebridge.evaluation.calibration import measure_judge_error
from safebridge.evaluation.judges import (
    REFUSAL_RULES,
    Judgement,
    measure_rules_fingerprint,
    score_refusal,
)

ROOT = Path(__file__).resolve().parent.parent
JSON_PATH = ROOT / "src/safebridge/evaluation/judge_error.json"
DOCS_PATH = ROOT / "docs/judges.md"
SALT = "safebridge-judge-1"
SHORT_WORDS = 20  # about what 24 to 32 new tokens hold

XSTEST = "XSTest, Roettger et al. 2024 (arXiv:2308.01263), answers of 3 models"
MSTS = "MSTS, Roettger et al. 2025 (arXiv:2501.10057)"

Row = dict[str, str]


@dataclass(frozen=True)
class Measurement:
    """One comparison of the judge with people."""

    name: str
    definition: str
    source: str
    file: str
    key: str
    """Column that says which rows share a half."""
    text: str
    """Column of the answer."""
    label: Callable[[Row], bool | None]
    """Whether people call it a refusal; None leaves the row out."""
    verdict: Callable[[Judgement], bool] = lambda judgement: judgement.is_refusal
    words: int | None = None
    """How many words of the answer the judge reads."""
    is_primary: bool = False


def _xstest(*classes: str) -> Callable[[Row], bool]:
    return lambda row: row["final_label"][0] in classes


def _msts(row: Row) -> bool:
    return row["final_taxonomy"][:3] in {"1.1", "1.2"}


def _msts_refusal_only(row: Row) -> bool | None:
    kind = row["final_taxonomy"][:3]
    return None if kind == "1.1" else kind == "1.2"


def _declines_or_objects(judgement: Judgement) -> bool:
    return judgement.label in {"refusal", "objection"}


def _msts_measurements(part: str, models: int) -> list[Measurement]:
    """Return the three readings of one MSTS file."""
    source = f"{MSTS}, {part} prompts, answers of {models} models"
    file = f"msts_english_{part}.csv"
    return [
        Measurement(
            f"msts-{part}",
            "People: 1.1 rejection or rebuttal, or 1.2 refusal only. Judge: refusal.",
            source,
            file,
            "case_id",
            "response",
            _msts,
        ),
        Measurement(
            f"msts-{part}-with-objections",
            "People: 1.1 rejection or rebuttal, or 1.2 refusal only. Judge: refusal or objection.",
            source,
            file,
            "case_id",
            "response",
            _msts,
            verdict=_declines_or_objects,
        ),
        Measurement(
            f"msts-{part}-refusal-only",
            "People: 1.2 refusal only; 1.1 is left out, it holds refusals and rebuttals alike. "
            "Judge: refusal.",
            source,
            file,
            "case_id",
            "response",
            _msts_refusal_only,
        ),
    ]


def _xstest_measurement(
    name: str, definition: str, *classes: str, words: int | None = None, is_primary: bool = False
) -> Measurement:
    return Measurement(
        name,
        definition,
        XSTEST,
        "xstest_human_labels.csv",
        "id",
        "completion",
        _xstest(*classes),
        words=words,
        is_primary=is_primary,
    )


MEASUREMENTS = (
    _xstest_measurement(
        "xstest-full", "People: full refusal. Judge: refusal.", "2", is_primary=True
    ),
    _xstest_measurement(
        "xstest-full-or-partial", "People: full or partial refusal. Judge: refusal.", "2", "3"
    ),
    _xstest_measurement(
        "xstest-full-short",
        f"As xstest-full, but the judge reads only the first {SHORT_WORDS} words, as with the "
        "short answers of the suites.",
        "2",
        words=SHORT_WORDS,
    ),
    *_msts_measurements("multimodal", 5),
    *_msts_measurements("textonly", 2),
)


def is_development(key: str) -> bool:
    """Say whether the rows of a prompt are in the half that rules may be developed on."""
    return hashlib.sha256(f"{SALT}:{key}".encode()).digest()[0] % 2 == 0


def measure(folder: Path, plan: Measurement, *, development: bool = False) -> dict[str, Any]:
    """Return one entry of `judge_error.json`."""
    with (folder / plan.file).open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if is_development(row[plan.key]) == development]
    judged, human = [], []
    for row in rows:
        label = plan.label(row)
        if label is not None:
            answer = row[plan.text]
            answer = answer if plan.words is None else " ".join(answer.split()[: plan.words])
            judged.append(plan.verdict(score_refusal(answer)))
            human.append(label)
    return {
        "name": plan.name,
        "is_primary": plan.is_primary,
        "definition": plan.definition,
        "source": plan.source,
        "licence": "CC BY 4.0",
        **measure_judge_error(judged, human).to_json(),
    }


def build_report(folder: Path, *, development: bool = False) -> dict[str, Any]:
    """Return the content of `judge_error.json`."""
    return {
        "judge": "refusal-rules",
        "rules_sha256": measure_rules_fingerprint(),
        "split": {
            "unit": "prompt",
            "salt": SALT,
            "rule": "sha256(salt:prompt id), first byte even: development, odd: measured here",
            "half": "development" if development else "measured",
        },
        "measurements": [measure(folder, plan, development=development) for plan in MEASUREMENTS],
    }


def _percent(rate: dict[str, float]) -> str:
    return f"{rate['value']:.1%} [{rate['low']:.1%}, {rate['high']:.1%}]"


def render_rules() -> str:
    """Return the rule table of `docs/judges.md`."""
    lines = ["| rule | label | sentences read | fires on |", "|---|---|---|---|"]
    lines += [
        f"| `{rule.name}` | {rule.label} | {rule.sentences} | {rule.example} |"
        for rule in REFUSAL_RULES
    ]
    return "\n".join(lines)


def render_error(report: dict[str, Any]) -> str:
    """Return the error table of `docs/judges.md`."""
    lines = [
        "| measurement | n | precision | recall | false alarms |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| `{entry['name']}` | {entry['n']} | {_percent(entry['precision'])} "
        f"| {_percent(entry['recall'])} | {_percent(entry['false_alarm_rate'])} |"
        for entry in report["measurements"]
    ]
    lines += ["", *(f"- `{e['name']}`: {e['definition']}" for e in report["measurements"])]
    lines += ["", "Sources, all CC BY 4.0:", ""]
    lines += [
        f"- {source}" for source in dict.fromkeys(e["source"] for e in report["measurements"])
    ]
    return "\n".join(lines)


def replace_part(text: str, name: str, content: str) -> str:
    """Put `content` between the markers of a generated part."""
    start, end = f"<!-- {name}: generated -->", f"<!-- /{name} -->"
    head, _, rest = text.partition(start)
    _, _, tail = rest.partition(end)
    return f"{head}{start}\n{content}\n{end}{tail}"


def main() -> None:
    """Measure, and write both files; with --development only print the other half."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data/judge_calibration")
    parser.add_argument(
        "--development",
        action="store_true",
        help="print the development half instead and write nothing",
    )
    options = parser.parse_args()
    report = build_report(options.data, development=options.development)
    print(render_error(report))
    if options.development:
        return
    JSON_PATH.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    text = DOCS_PATH.read_text(encoding="utf-8")
    text = replace_part(text, "rules", render_rules())
    DOCS_PATH.write_text(replace_part(text, "error", render_error(report)), encoding="utf-8")


if __name__ == "__main__":
    main()
