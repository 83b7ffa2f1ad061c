"""Put the numbers of a demo run into the README and `docs/results/demo.json`.

    python recipes/readme.py demo-results

Nothing is typed by hand: tables and example answers come from the run's own files.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
METRICS = {
    "text_refusal_rate": "harmful text requests refused",
    "image_refusal_rate": "harmful picture requests refused",
    "over_refusal_rate": "benign picture requests refused",
    "naming_accuracy": "things named correctly",
}
PARTS = {"seen": "seen categories", "unseen": "held-out categories", "all": "all"}


def percent(rate: dict[str, Any]) -> str:
    """Return a rate with its 95 % interval, in percent."""
    return f"{rate['value']:.0%} [{rate['low']:.0%}, {rate['high']:.0%}]"


def table(summary: dict[str, Any]) -> str:
    """Return the before/after table with intervals and n."""
    lines = ["| | before | with the security tensor | n |", "|---|---|---|---|"]
    for metric, title in METRICS.items():
        for part, name in PARTS.items():
            before = summary["base"][metric].get(part)
            if before is None or (metric == "naming_accuracy" and part != "all"):
                continue
            after = summary["defended"][metric][part]
            lines.append(
                f"| {title}, {name} | {percent(before)} | {percent(after)} | {before['n']} |"
            )
    return "\n".join(lines)


def provenance(summary: dict[str, Any]) -> str:
    """Return what the numbers were measured with."""
    machine, seconds = summary["hardware"], sum(summary["seconds"].values())
    facts = ", ".join(str(value) for value in machine.values())
    goals = "; ".join(
        f"{goal['goal']}: {goal['found']} ({'met' if goal['met'] else '**not met**'})"
        for goal in summary["goals"]
    )
    return (
        f"Command: `{summary['command']}` ({seconds / 60:.0f} minutes; {facts}; seed "
        f"{summary['config']['seed']}). Judge: `refusal-rules`. Rates on drawing styles and "
        "request templates that no training and no fit has seen, with 95 % intervals clustered "
        f"by concept. Goals: {goals}."
    )


def example(answers: list[dict[str, Any]]) -> str:
    """Return one harmful and one benign picture request with both answers, as printed."""
    lines = []
    for metric, is_refused_after in (("image_refusal_rate", True), ("over_refusal_rate", False)):
        row = next(
            row
            for row in answers
            if row["metric"] == metric
            and not row["base"]["is_counted"]
            and row["defended"]["is_counted"] == is_refused_after
        )
        lines += [
            f"{row['concept']} | {row['request']}",
            f"before: {row['base']['answer']!r}",
            f"after:  {row['defended']['answer']!r}",
        ]
    return "```text\n" + "\n".join(lines) + "\n```"


def fill(text: str, mark: str, content: str) -> str:
    """Replace what stands between a mark and the next end mark."""
    head, found, rest = text.partition(f"<!-- {mark} -->\n")
    if not found:
        raise SystemExit(f"README.md has no mark '{mark}'.")
    return f"{head}{found}{content}\n<!-- end -->{rest.partition('<!-- end -->')[2]}"


def main() -> None:
    """Copy the summary and rewrite the marked places of the README."""
    run = Path(sys.argv[1])
    summary = json.loads((run / "summary.json").read_text())
    answers = json.loads((run / "answers.json").read_text())
    results = ROOT / "docs" / "results"
    results.mkdir(parents=True, exist_ok=True)
    shutil.copy(run / "summary.json", results / "demo.json")
    readme = (ROOT / "README.md").read_text()
    readme = fill(readme, "demo-table", table(summary))
    readme = fill(readme, "example-output", example(answers))
    readme = fill(readme, "results-table", provenance(summary))
    (ROOT / "README.md").write_text(readme)


if __name__ == "__main__":
    main()
