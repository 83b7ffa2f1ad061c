import json
from pathlib import Path
from typing import Any

import pytest
import torch

from safebridge.data.source import TwinSource
from safebridge.demo.config import DemoConfig
from safebridge.demo.run import run_demo
from safebridge.errors import DataError, UnknownNameError
from safebridge.methods.security_tensors.method import SecurityTensors
from safebridge.models.load import load_vlm

CONFIG = DemoConfig(
    harmful_samples=4,
    benign_samples=3,
    naming_samples=4,
    max_new_tokens=4,
    naming_tokens=3,
    batch_size=8,
    fit_harmful=4,
    fit_twins=4,
    fit_general=2,
    fit_answer_tokens=4,
    fit_batch_size=8,
    virtual_tokens=2,
    epochs=1,
    layer_samples=3,
    harmful_examples=2,
    benign_examples=1,
)

METRICS = ("text_refusal_rate", "image_refusal_rate", "over_refusal_rate", "naming_accuracy")


def read_summary(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


@pytest.fixture(scope="module")
def folder(twins: TwinSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "out"
    run_demo("tiny/llava", out, CONFIG, is_fast=True, command="safebridge demo", source=twins)
    return out


def test_everything_is_written(folder: Path) -> None:
    names = {"artifact", "logs", "report.html", "summary.json", "answers.json"}
    assert {path.name for path in folder.iterdir()} == names
    assert list(folder.parent.iterdir()) == [folder]
    assert (folder / "report.html").read_text().startswith("<!doctype html>")


def test_the_summary_holds_what_is_asked_of_it(folder: Path) -> None:
    summary = read_summary(folder)
    for side in ("base", "defended"):
        for metric in METRICS:
            for rate in summary[side][metric].values():
                assert set(rate) == {"value", "low", "high", "n"}
    for key in ("seeds", "versions", "hashes", "seconds", "hardware", "command", "config"):
        assert summary[key], key
    assert set(summary["hashes"]) == {"model", "data", "fit_samples", "artifact"}
    assert len(summary["goals"]) == 4
    assert len(summary["curves"]) == 3
    assert summary["judge"]["error"]["measurements"]


def test_the_artifact_loads_and_belongs_to_the_model(folder: Path) -> None:
    vlm = load_vlm("tiny/llava")
    method = SecurityTensors.load(folder / "artifact", vlm)
    assert method.tensors["tokens"].shape == (2, vlm.layout.hidden_size)
    assert read_summary(folder)["hashes"]["model"] == vlm.fingerprint


def test_every_answer_is_kept(folder: Path) -> None:
    answers = json.loads((folder / "answers.json").read_text())
    assert len(answers) == 4 * 4 + 2 * 3 + 4
    assert {"answer", "is_counted"} == set(answers[0]["base"])


def test_the_same_seed_gives_the_same_numbers(
    folder: Path, twins: TwinSource, tmp_path: Path
) -> None:
    torch.rand(3)  # what the process drew before must not matter
    out = tmp_path / "again"
    run_demo("tiny/llava", out, CONFIG, is_fast=True, command="safebridge demo", source=twins)
    first, again = read_summary(folder), read_summary(out)
    assert first.pop("seconds").keys() == again.pop("seconds").keys()
    assert first == again
    assert (folder / "answers.json").read_text() == (out / "answers.json").read_text()


def test_a_model_that_refuses_nothing_is_reported_honestly(folder: Path) -> None:
    notes = read_summary(folder)["notes"]
    assert any("little text safety" in note for note in notes)
    assert notes[0].split(":")[0] in (folder / "report.html").read_text()


def test_earlier_results_survive_an_unknown_model(folder: Path, twins: TwinSource) -> None:
    before = (folder / "summary.json").read_text()
    with pytest.raises(UnknownNameError):
        run_demo("tiny/nothing", folder, CONFIG, source=twins)
    assert (folder / "summary.json").read_text() == before
    assert list(folder.parent.iterdir()) == [folder]


def test_a_bad_place_is_found_before_the_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Create it first"):
        run_demo("no/such-model", tmp_path / "a" / "b", CONFIG)
