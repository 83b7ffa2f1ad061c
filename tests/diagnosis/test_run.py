"""One diagnosis of a tiny model: files, numbers that agree, and a model found where it is built."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from PIL import Image

from safebridge.data.sample import Sample
from safebridge.diagnosis.config import CONDITIONS, DiagnosisConfig
from safebridge.diagnosis.layers import build_figures, capture_groups, choose_groups, measure_lens
from safebridge.diagnosis.plan import build_cases, find_twins
from safebridge.diagnosis.run import RESULT_NAMES, run_diagnosis
from safebridge.errors import ArtifactError, DataError
from safebridge.methods.security_tensors.config import SecurityTensorsConfig
from safebridge.methods.security_tensors.method import SecurityTensors
from safebridge.models.hooks import replace_output
from safebridge.testing.tiny import tiny_vlm

Diagnosis = tuple[Path, dict[str, Any]]


def test_everything_is_written_and_nothing_else(diagnosis: Diagnosis) -> None:
    out, summary = diagnosis
    assert {path.name for path in out.iterdir()} == RESULT_NAMES
    assert json.loads((out / "diagnosis.json").read_text()) == json.loads(json.dumps(summary))
    keys = [one["key"] for name in ("curves", "sites", "points") for one in summary[name]]
    for key in ("refusals", *keys):
        with Image.open(out / "figures" / f"{key}.png") as picture:
            assert picture.width > 500
        assert (out / "figures" / f"{key}.svg").read_text().startswith("<?xml")
    assert {"angular_gap", "safety_signal", "caption_cosine", "head_accuracy"} <= set(keys)


def test_json_and_parquet_hold_the_same_numbers(diagnosis: Diagnosis) -> None:
    out, summary = diagnosis
    rows = json.loads((out / "numbers.json").read_text())
    table = pyarrow.parquet.read_table(out / "numbers.parquet").to_pylist()
    assert len(rows) == len(table) > 150
    for row, other in zip(rows, table, strict=True):
        kept = {name: value for name, value in other.items() if value not in (None, "")}
        assert kept == row
        assert {
            "variant",
            "setting",
            "metric",
            "split",
            "value",
            "low",
            "high",
            "n",
            "seeds",
        } <= set(row)
        assert row["low"] <= row["high"]
    gap = next(one for one in summary["curves"] if one["key"] == "angular_gap")
    points = [row for row in rows if row["metric"] == "angular_gap" and row["setting"] == "text"]
    assert [row["value"] for row in points] == list(gap["curves"][0]["values"])
    assert [row["layer"] for row in points] == list(gap["curves"][0]["layers"])


def test_every_answer_is_kept(diagnosis: Diagnosis) -> None:
    out, summary = diagnosis
    answers = json.loads((out / "answers.json").read_text())
    assert len(answers) == 16 == summary["samples"]["harmful"] + summary["samples"]["harmless"]
    for one in answers:
        assert set(one["answers"]["base"]) == set(CONDITIONS) == set(one["requests"])
    refused = sum(
        one["answers"]["base"]["picture"]["label"] == "refusal"
        for one in answers
        if one["is_harmful"]
    )
    rate = next(
        one
        for one in summary["records"]
        if (one["setting"], one["metric"]) == ("picture", "refusal_rate") and "category" not in one
    )
    assert rate["value"] == pytest.approx(refused / 8)


def test_a_planted_layer_is_found_in_text_and_not_in_pictures(
    samples: list[Sample], small: DiagnosisConfig, tmp_path: Path
) -> None:
    # From layer 2 on, the model adds a direction to the end of harmful requests in words.
    vlm = tiny_vlm("llava")
    cases = build_cases(find_twins(samples), tmp_path)
    groups = choose_groups(cases, 8)
    harmful = {
        tuple(vlm.tokenizer(sample.concept, add_special_tokens=False)["input_ids"])
        for sample in groups.samples["text", True]
    }
    seen: list[torch.Tensor] = []

    def is_harmful(row: torch.Tensor) -> bool:
        ids = row.tolist()
        return any(
            tuple(ids[i : i + len(name)]) == name for name in harmful for i in range(len(ids))
        )

    def plant(hidden: torch.Tensor) -> torch.Tensor:
        marks = torch.tensor([float(is_harmful(row)) for row in seen[-1]])
        new = hidden.clone()
        new[:, -1, 0] += 40 * marks
        return new

    def remember(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["input_ids"] if "input_ids" in kwargs else args[0])

    handle = vlm.model.register_forward_pre_hook(remember, with_kwargs=True)
    try:
        with replace_output(vlm.layout.layer(vlm.model, 2), plant):
            base = capture_groups(vlm, groups, batch_size=4)
            lens = {"base": measure_lens(vlm, groups, batch_size=4)}
            figures = build_figures(vlm, groups, base, {}, lens=lens, config=small)
    finally:
        handle.remove()
    assert groups.same_wording
    band = figures.ranges["text"]
    assert band is not None
    assert band.first == 2
    gap = {curve.name: curve for curve in figures.curves[0].curves}
    assert max(gap["picture"].values) < 0.2 * max(gap["text"].values)
    assert max(gap["text"].high[:2]) < min(gap["text"].low[2:])
    probes = next(one for one in figures.curves if one.key == "probe_accuracy")
    text = next(curve for curve in probes.curves if curve.name == "text to text")
    assert text.values[2] == 1.0 >= text.values[1]


def test_what_is_no_defense_or_no_place_is_refused_before_the_work(
    twins_file: Path, small: DiagnosisConfig, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match="no fitted defense"):
        run_diagnosis("tiny/llava", tmp_path / "out", small, defenses=[tmp_path])
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("keep")
    with pytest.raises(DataError, match="not earlier results"):
        run_diagnosis("tiny/llava", tmp_path / "mine", small, twins_file=twins_file)
    assert (tmp_path / "mine" / "letter.txt").read_text() == "keep"


def test_a_model_that_reads_pictures_by_cross_attention_is_diagnosed_too(
    twins_file: Path, small: DiagnosisConfig, tmp_path: Path
) -> None:
    summary = run_diagnosis("tiny/mllama", tmp_path / "out", small, twins_file=twins_file)
    keys = {one["key"] for one in summary["curves"]}
    assert {"angular_gap", "safety_signal"} <= keys
    assert not {"caption_cosine", "refusal_word_probability"} & keys
    assert "by cross-attention" in summary["notes"][0]


def test_a_defense_is_measured_beside_the_base_model(
    samples: list[Sample], twins_file: Path, small: DiagnosisConfig, tmp_path: Path
) -> None:
    answer = {True: ("SA", "Sorry, no."), False: ("TCB", "Sure.")}
    fitted = [
        replace(one, set_name=answer[one.is_harmful][0], answer=answer[one.is_harmful][1])
        for one in samples
        if one.images
    ]
    config = SecurityTensorsConfig(num_virtual_tokens=2, epochs=1, batch_size=8)
    folder = SecurityTensors.fit(tiny_vlm("llava"), fitted, config).save(tmp_path / "artifact")
    out = tmp_path / "out"
    summary = run_diagnosis("tiny/llava", out, small, defenses=[folder], twins_file=twins_file)
    assert [one["name"] for one in summary["defenses"]] == ["security-tensors"]
    figures = {one["key"]: one for one in summary["curves"]}
    moved = figures["activation_shift_security_tensors"]["curves"]
    assert [curve["name"] for curve in moved] == ["N-(N+d)", "M-(M+d)", "difference"]
    assert max(moved[1]["values"]) > 0.1
    assert "picture + security-tensors" in [one["name"] for one in figures["angular_gap"]["curves"]]
    asked = {one["setting"] for one in summary["records"] if one["variant"] == "security-tensors"}
    assert {"text", "picture"} <= asked
    assert "typographic" not in asked
    assert (out / "report.html").read_text().count("security-tensors") > 3
