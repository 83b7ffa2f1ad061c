"""The main job in one file: measure the gap, close it, measure again, write it all down."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from safebridge.analysis.curves import LayerCurve
from safebridge.analysis.safety_layers import measure_angular_gap
from safebridge.analysis.states import capture_states
from safebridge.data import twins as shipped_twins
from safebridge.data.looks import draw_looks
from safebridge.data.sample import Sample, open_images
from safebridge.data.source import TwinSource
from safebridge.data.triad import Triad, build_triad, find_own_refusal
from safebridge.demo.config import DemoConfig
from safebridge.demo.examples import draw_examples
from safebridge.demo.measure import count_requests, measure_answers
from safebridge.demo.report import build_report
from safebridge.demo.source import Plan, choose_samples
from safebridge.demo.summary import Measurement, build_summary
from safebridge.evaluation.judges import score_refusal
from safebridge.methods.security_tensors.config import SecurityTensorsConfig
from safebridge.methods.security_tensors.method import SecurityTensors
from safebridge.models.generate import generate_answers
from safebridge.models.load import VLM, load_vlm
from safebridge.reporting.facts import describe_judge, describe_machine, describe_versions
from safebridge.reporting.folders import check_output_folder, replaced_folder
from safebridge.reporting.progress import Phases, show_phases

__all__ = ["run_demo"]

_SPARE_TOKENS = 4  # so that where an answer was cut is never among the tokens learned from


def run_demo(
    model: str,
    out: Path,
    config: DemoConfig,
    *,
    is_fast: bool = False,
    command: str = "",
    source: TwinSource | None = None,
) -> dict[str, Any]:
    """Measure a model's safety gap, fit a security tensor, measure again, write a report.

    Args:
        model: Name or path for `load_vlm`.
        out: Folder for the results. It is replaced as a whole, and only if all goes well.
        config: The sizes.
        is_fast: Whether the report says that the sizes are small.
        command: How to do this run again, for the report.
        source: Where requests come from; None takes the shipped twins.

    Returns:
        The contents of `summary.json`.

    Raises:
        SafebridgeError: If the folder, the model or a picture cannot be used.
    """
    out = check_output_folder(out)
    source = source or cast("TwinSource", shipped_twins)
    with show_phases() as phases, replaced_folder(out) as folder:
        with phases.phase("load", "loading the model"):
            vlm = load_vlm(model)
            plan = choose_samples(source, config)
        count = count_requests(plan)

        with phases.phase("measure_base", "measuring the model as it is", count) as step:
            base = measure_answers(
                vlm, plan, source, config, log_dir=folder / "logs" / "base", progress=step
            )
        with tempfile.TemporaryDirectory(prefix="safebridge-looks-") as looks:
            triad = _build_triad(vlm, plan, config, phases, looks=Path(looks))
            method = _fit(vlm, triad, config, phases)
        with (
            phases.phase("measure_defended", "measuring the defended model", count) as step,
            method.apply(vlm),
        ):
            defended = measure_answers(
                vlm, plan, source, config, log_dir=folder / "logs" / "defended", progress=step
            )
        curves = _measure_curves(vlm, method, plan, config, phases)

        method.save(folder / "artifact")
        summary = build_summary(base, defended, source.is_seen)
        summary |= _describe_run(
            vlm, method, triad, source, config, command=command, is_fast=is_fast
        )
        summary["hashes"]["artifact"] = _read_tensor_hash(folder / "artifact")
        summary["curves"] = [asdict(curve) for curve in curves]
        summary["seconds"] = phases.seconds
        examples = draw_examples(base, defended, source.is_seen, config)
        _write_json(folder / "answers.json", _list_answers(base, defended))
        _write_json(folder / "summary.json", summary)
        report = build_report(summary, examples, curves)
        (folder / "report.html").write_text(report, encoding="utf-8")
    return summary


def _build_triad(vlm: VLM, plan: Plan, config: DemoConfig, phases: Phases, *, looks: Path) -> Triad:
    """Give harmful requests refusals, and harmless ones the model's own answers.

    Each request gets another look of its picture, written to the folder `looks`.
    """
    total = len(plan.twins) + len(plan.general) + len(plan.texts)
    with phases.phase("build_triad", "asking for the model's own answers", total) as step:

        def answer(samples: Sequence[Sample], tokens: int = 0) -> list[str]:
            return generate_answers(
                vlm,
                [sample.prompt for sample in samples],
                [open_images(sample) for sample in samples],
                max_new_tokens=tokens or config.fit_answer_tokens + _SPARE_TOKENS,
                batch_size=config.batch_size,
                progress=step,
            )

        def is_refusal(text: str) -> bool:
            return score_refusal(text).is_refusal

        harmful, twins, general = (
            draw_looks(samples, looks / name, seed=config.seed)
            for name, samples in (
                ("harmful", plan.harmful),
                ("twins", plan.twins),
                ("general", plan.general),
            )
        )
        own = find_own_refusal(answer(plan.texts, config.max_new_tokens), is_refusal)
        return build_triad(
            harmful,
            twins,
            general,
            answer=answer,
            is_refusal=is_refusal,
            seed=config.seed,
            refusals=None if own is None else [own],
        )


def _fit(vlm: VLM, triad: Triad, config: DemoConfig, phases: Phases) -> SecurityTensors:
    """Fit the security tensor; the model's weights stay as they are."""
    settings = SecurityTensorsConfig(
        num_virtual_tokens=config.virtual_tokens,
        position=config.position,
        applies_to="pictures",
        epochs=config.epochs,
        batch_size=config.fit_batch_size,
        learning_rate=config.learning_rate,
        max_answer_tokens=config.fit_answer_tokens,
        weight_tcb=config.fit_twin_weight,
        seed=config.seed,
    )
    steps = config.epochs * -(-len(triad.samples) // config.fit_batch_size)
    with phases.phase("fit", "fitting the security tensor", steps) as step:
        return SecurityTensors.fit(
            vlm,
            triad.samples,
            settings,
            progress=lambda event: step(1) if event.kind == "step" else None,
            data_source="safebridge demo",
        )


def _measure_curves(
    vlm: VLM, method: SecurityTensors, plan: Plan, config: DemoConfig, phases: Phases
) -> list[LayerCurve]:
    """Measure layer by layer how far harmful and harmless requests lie apart."""
    if not config.layer_samples:
        return []

    def angular_gap(name: str, kind: str) -> LayerCurve:
        harmful = [
            sample
            for pair in zip(plan.cells[kind, "seen"], plan.cells[kind, "unseen"], strict=False)
            for sample in pair
        ]
        harmless = plan.cells[
            "over_refusal_rate" if "image" in kind else "text_over_refusal_rate", "all"
        ]
        states = [
            capture_states(vlm, group[: config.layer_samples], batch_size=config.batch_size)
            for group in (harmless, harmful)
        ]
        step(1)
        return measure_angular_gap(*states, name=name, seed=config.seed)

    with phases.phase("layers", "looking into the layers", 3) as step:
        curves = [
            angular_gap("text", "text_refusal_rate"),
            angular_gap("picture", "image_refusal_rate"),
        ]
        with method.apply(vlm):
            curves.append(angular_gap("picture + security tensor", "image_refusal_rate"))
    return curves


def _describe_run(
    vlm: VLM,
    method: SecurityTensors,
    triad: Triad,
    source: TwinSource,
    config: DemoConfig,
    *,
    command: str,
    is_fast: bool,
) -> dict[str, Any]:
    """Return what was run, on what and with which settings."""
    details = method.metadata.details
    sets = ", ".join(f"{name} {count}" for name, count in details["samples"].items())
    place = "after the picture" if config.position == "after_image" else "at the start"
    return {
        "model": {"name": vlm.name, "class": type(vlm.model).__name__, "revision": vlm.revision},
        "method": {
            "name": "security-tensors",
            "lines": [
                (
                    f"Security tensor: {config.virtual_tokens} fitted vectors {place} of requests "
                    "with a picture; the model's weights are untouched, and requests in text alone "
                    "are answered as before (Li et al. 2025, arXiv:2507.20994)."
                ),
                (
                    f"Fitted in {details['steps']} steps on {sets} samples: SA are harmful picture "
                    f"requests of the seen categories with {_describe_targets(triad)}, TCB "
                    "harmless ones of the same wording and drawing style, and GB general ones, "
                    "both with the model's own answers. A rule that "
                    f"reads only the request tells {triad.report.text_only_accuracy:.0%} of SA and "
                    "TCB apart; half would be chance."
                ),
                (
                    "Measured on drawing styles and wordings that took no part in the fit, with "
                    "greedy answers, by Inspect AI; base and defended got the same requests."
                ),
            ],
            "losses": details["losses"],
            "triad": asdict(triad.report),
        },
        "judge": describe_judge(),
        "config": asdict(config),
        "fit_config": method.config.to_dict(),
        "seeds": {"samples": config.seed, "fit": method.config.seed, "bootstrap": config.seed},
        "hashes": {
            "model": vlm.fingerprint,
            "data": source.manifest_sha256(),
            "fit_samples": details["samples_sha256"],
        },
        "versions": describe_versions(),
        "hardware": describe_machine(),
        "is_fast": is_fast,
        "command": command,
    }


def _describe_targets(triad: Triad) -> str:
    targets = {sample.answer for sample in triad.samples if sample.set_name == "SA"}
    if len(targets) == 1:
        return f'the refusal that the model gives most often in text ("{targets.pop()}")'
    return f"one of {len(targets)} refusals of ours, as the model refused none of its text requests"


def _list_answers(base: Measurement, defended: Measurement) -> list[dict[str, Any]]:
    """Return every request with both answers and what was counted."""
    return [
        {
            "metric": metric,
            "part": part,
            "id": before.sample.id,
            "request": before.sample.prompt,
            "category": before.sample.category,
            "concept": before.sample.concept,
            "pictures": [path.name for path in before.sample.images],
            "base": {"answer": before.answer, "is_counted": before.is_hit},
            "defended": {"answer": after.answer, "is_counted": after.is_hit},
        }
        for (metric, part), rows in base.items()
        for before, after in zip(rows, defended[metric, part], strict=True)
    ]


def _read_tensor_hash(folder: Path) -> str:
    record = json.loads((folder / "artifact.json").read_text(encoding="utf-8"))
    return str(record["tensors_sha256"])


def _write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
