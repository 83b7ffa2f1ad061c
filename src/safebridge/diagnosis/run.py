"""The whole diagnosis in one file: ask, look into the layers, judge, and write it all down."""

import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safebridge.analysis.curves import LayerCurve
from safebridge.analysis.spelled_pictures import can_spell
from safebridge.data.source import TwinSource
from safebridge.diagnosis.config import CONDITIONS, SPELLED, DiagnosisConfig
from safebridge.diagnosis.defenses import Defense, load_defenses
from safebridge.diagnosis.figures import (
    plot_curves,
    plot_points,
    plot_refusals,
    plot_sites,
    save_figure,
)
from safebridge.diagnosis.layers import (
    Figures,
    build_figures,
    capture_groups,
    choose_groups,
    measure_lens,
)
from safebridge.diagnosis.plan import Case, build_cases, load_twins
from safebridge.diagnosis.rates import Replies, ask_cases, measure_refusals
from safebridge.diagnosis.report import build_report
from safebridge.diagnosis.results import Record, list_curve_records
from safebridge.diagnosis.tables import list_site_records, write_json, write_records
from safebridge.diagnosis.verdict import write_verdict
from safebridge.models.load import VLM, load_vlm
from safebridge.reporting.facts import describe_judge, describe_machine, describe_versions
from safebridge.reporting.folders import check_output_folder, replaced_folder
from safebridge.reporting.progress import Phases, show_phases

__all__ = ["RESULT_NAMES", "run_diagnosis"]

RESULT_NAMES = frozenset(
    {
        "answers.json",
        "diagnosis.json",
        "figures",
        "logs",
        "numbers.json",
        "numbers.parquet",
        "pictures",
        "report.html",
    }
)
"""What a diagnosis writes; a folder that holds anything else is not ours to replace."""

_FORMAT = 1


def run_diagnosis(
    model: str,
    out: Path,
    config: DiagnosisConfig,
    *,
    defenses: Sequence[Path] = (),
    twins_file: Path | None = None,
    allow_other_model: bool = False,
    is_fast: bool = False,
    command: str = "",
    source: TwinSource | None = None,
) -> dict[str, Any]:
    """Show whether, where and why a model's text safety fails on pictures.

    Args:
        model: Name or path for `load_vlm`.
        out: Folder for the results. It is replaced as a whole, and only if all goes well.
        config: The sizes.
        defenses: Artifact folders of defenses to measure as well.
        twins_file: The user's own twins; None takes the shipped ones.
        allow_other_model: Accept defenses of another model on purpose.
        is_fast: Whether the report says that the sizes are small.
        command: How to do this run again, for the report.
        source: Where shipped twins come from; None is `safebridge.data.twins`.

    Returns:
        The contents of `diagnosis.json`.

    Raises:
        SafebridgeError: If the folder, the model, a defense or a picture cannot be used.
    """
    out = check_output_folder(out, names=RESULT_NAMES)
    with show_phases() as phases, replaced_folder(out) as folder:
        for name in ("figures", "pictures"):
            (folder / name).mkdir()
        with phases.phase("load", "loading the model"):
            vlm = load_vlm(model)
            loaded = load_defenses(vlm, defenses, allow_other_model=allow_other_model)
        with phases.phase("draw", "drawing requests"):
            twins = load_twins(config, file=twins_file, source=source)
            cases = build_cases(twins, folder / "pictures", seed=config.seed)
        replies = _ask(vlm, loaded, cases, config, folder=folder, phases=phases)
        records = [
            record
            for variant, own in replies.items()
            for record in measure_refusals(variant, cases, own, config)
        ]
        figures = _look_into_layers(vlm, loaded, cases, config, phases)
        with phases.phase("write", "drawing figures and the report"):
            if figures is not None:
                seeds = (config.seed,)
                records += figures.records
                records += list_curve_records(figures.curves, split=config.split, seeds=seeds)
                records += list_site_records(figures.sites, split=config.split, seeds=seeds)
            _save_figures(records, figures, list(replies), folder / "figures")
            summary = _describe(vlm, loaded, cases, records, figures=figures, config=config)
            summary |= {
                "is_fast": is_fast,
                "command": command or shlex.join(["safebridge", "diagnose", model]),
                "twins": str(twins_file or "shipped"),
            }
            answers = _list_answers(cases, replies)
        summary["seconds"] = phases.seconds
        write_records(records, folder)
        write_json(folder / "answers.json", answers)
        write_json(folder / "diagnosis.json", summary)
        report = build_report(summary, cases, replies, shown=config.shown_samples)
        (folder / "report.html").write_text(report, encoding="utf-8")
    return summary


def _ask(
    vlm: VLM,
    defenses: Sequence[Defense],
    cases: Sequence[Case],
    config: DiagnosisConfig,
    *,
    folder: Path,
    phases: Phases,
) -> dict[str, Replies]:
    """Ask the model as it is everything, and each defended one what the config names."""
    replies: dict[str, Replies] = {}
    asked = [name for name in CONDITIONS if name != SPELLED or can_spell(vlm)]
    plan: list[tuple[str, Defense | None, Sequence[str]]] = [("base", None, asked)]
    plan += [(one.name, one, config.conditions_with_defense) for one in defenses]
    for name, defense, conditions in plan:
        with (
            phases.phase("ask", f"asking: {name}", len(conditions) * len(cases)) as step,
            nullcontext() if defense is None else defense.method.apply(vlm),
        ):
            replies[name] = ask_cases(
                vlm, cases, conditions, config, log_dir=folder / "logs" / name, progress=step
            )
    return replies


def _look_into_layers(
    vlm: VLM,
    defenses: Sequence[Defense],
    cases: Sequence[Case],
    config: DiagnosisConfig,
    phases: Phases,
) -> Figures | None:
    if not config.layer_samples:
        return None
    groups = choose_groups(cases, config.layer_samples)
    with phases.phase("layers", "looking into the layers", 2 + len(defenses)) as step:
        base = capture_groups(vlm, groups, batch_size=config.batch_size)
        lens: dict[str, dict[str, LayerCurve]] = {
            "base": measure_lens(vlm, groups, batch_size=config.batch_size)
        }
        step(1)
        defended = {}
        for defense in defenses:
            with defense.method.apply(vlm):
                defended[defense.name] = capture_groups(
                    vlm, groups, batch_size=config.batch_size, media=("picture",)
                )
                own = measure_lens(vlm, groups, batch_size=config.batch_size)
                lens[defense.name] = {name: own[name] for name in own if name == "picture"}
            step(1)
        return build_figures(vlm, groups, base, defended, lens=lens, config=config)


def _save_figures(
    records: Sequence[Record], figures: Figures | None, variants: Sequence[str], folder: Path
) -> None:
    save_figure(plot_refusals(records, variants), folder, "refusals")
    if figures is None:
        return
    for curves in figures.curves:
        save_figure(plot_curves(curves), folder, curves.key)
    for sites in figures.sites:
        save_figure(plot_sites(sites), folder, sites.key)
    for points in figures.points:
        save_figure(plot_points(points), folder, points.key)


def _describe(
    vlm: VLM,
    defenses: Sequence[Defense],
    cases: Sequence[Case],
    records: Sequence[Record],
    *,
    figures: Figures | None,
    config: DiagnosisConfig,
) -> dict[str, Any]:
    """Return `diagnosis.json`, less what only the caller knows."""
    counts = {side: sum(case.is_harmful == side for case in cases) for side in (True, False)}
    return {
        "format": _FORMAT,
        "model": {"name": vlm.name, "class": type(vlm.model).__name__, "revision": vlm.revision},
        "defenses": [
            {"name": one.name, "kind": one.kind, "folder": str(one.folder)} for one in defenses
        ],
        "verdict": [
            {"question": one.question, "text": one.text, "rests_on": list(one.rests_on)}
            for one in write_verdict(records, figures)
        ],
        "records": [
            record.to_json() for record in records if record.layer is None and record.head is None
        ],
        "curves": [asdict(one) for one in figures.curves] if figures else [],
        "sites": [asdict(one) for one in figures.sites] if figures else [],
        "points": [asdict(one) for one in figures.points] if figures else [],
        "sweep": asdict(figures.sweep) if figures and figures.sweep else None,
        "notes": list(figures.notes) if figures else [],
        "samples": {"harmful": counts[True], "harmless": counts[False]},
        "judge": describe_judge(),
        "config": asdict(config),
        "hashes": {"model": vlm.fingerprint},
        "versions": describe_versions(),
        "hardware": describe_machine(),
    }


def _list_answers(cases: Sequence[Case], replies: dict[str, Replies]) -> list[dict[str, Any]]:
    """Return every request with every answer to it."""
    return [
        {
            "id": case.id,
            "concept": case.concept,
            "category": case.category,
            "is_harmful": case.is_harmful,
            "requests": {
                name: {"prompt": one.prompt, "pictures": [path.name for path in one.images]}
                for name, one in case.samples.items()
            },
            "answers": {
                variant: {name: asdict(rows[number]) for name, rows in own.items()}
                for variant, own in replies.items()
            },
        }
        for number, case in enumerate(cases)
    ]
