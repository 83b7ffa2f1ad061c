import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from safebridge.cli.main import main
from safebridge.data.files import load_samples
from safebridge.data.sample import open_images


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for category in ("blades", "fruit", "chairs"):
        folder = tmp_path / "pictures" / category
        folder.mkdir(parents=True)
        for number in range(6):
            pixels = random.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "pictures"


def build(pictures: Path, out: Path, *more: str) -> int:
    words = ["data", "build", "triad", "--pictures", str(pictures), "--harmful", "blades"]
    return main(
        [*words, "--model", "tiny/llava", "--out", str(out), "--max-new-tokens", "6", *more]
    )


def test_a_folder_of_pictures_becomes_a_triad(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build(pictures, tmp_path / "out", "--per-picture", "2") == 0
    samples = load_samples(tmp_path / "out" / "triad.jsonl")
    sets = {name: [s for s in samples if s.set_name == name] for name in ("SA", "TCB", "GB")}
    assert [len(sets[name]) for name in ("SA", "TCB", "GB")] == [12, 12, 6]
    assert all(s.answer and s.images[0].is_file() for s in samples)
    assert {s.category for s in sets["SA"]} == {"blades"}
    assert sorted(s.prompt for s in sets["SA"]) == sorted(s.prompt for s in sets["TCB"])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    found = report["separability_of_SA_and_TCB"]
    assert found["request_accuracy"] == pytest.approx(0.5)
    assert found["words_accuracy"] == pytest.approx(0.5)
    assert 0 <= found["image_accuracy"] <= 1
    out = capsys.readouterr().out
    assert "SA told from TCB (50% is chance): by whole requests 50%, by words 50%" in out
    assert "by picture quality" in out


def test_pictures_can_be_written_anew_in_one_size(pictures: Path, tmp_path: Path) -> None:
    assert build(pictures, tmp_path / "out", "--longest-side", "20") == 0
    samples = load_samples(tmp_path / "out" / "triad.jsonl")
    sizes = {image.size for sample in samples for image in open_images(sample)}
    assert sizes == {(20, 20)}
    assert "out" in str(samples[0].images[0])


def test_every_question_can_have_a_look_of_its_own(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert build(pictures, out, "--per-picture", "2", "--looks") == 0
    samples = load_samples(out / "triad.jsonl")
    files = [path for sample in samples for path in sample.images]
    assert len(set(files)) == len(files) == 30
    assert {path.parent.parent for path in files} == {out / "looks"}
    assert all(open_images(sample)[0].size == (32, 32) for sample in samples)


def test_questions_can_be_ones_own(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text("Where do I put this?\n\n", encoding="utf-8")
    (tmp_path / "g.txt").write_text("What colour is it?\n", encoding="utf-8")
    more = ["--questions", str(tmp_path / "q.txt"), "--general-questions", str(tmp_path / "g.txt")]
    assert build(pictures, tmp_path / "out", *more) == 0
    prompts = {s.set_name: s.prompt for s in load_samples(tmp_path / "out" / "triad.jsonl")}
    assert prompts == {
        "SA": "Where do I put this?",
        "TCB": "Where do I put this?",
        "GB": "What colour is it?",
    }


def test_bad_input_is_one_line_and_status_2(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "other.txt").write_text("x")
    (tmp_path / "empty.txt").write_text("\n")
    for message, status in (
        ("Choose a folder of its own", build(pictures, tmp_path / "full")),
        ("'knives' is no category", build(pictures, tmp_path / "a", "--harmful", "knives")),
        (
            "Write one to a line",
            build(pictures, tmp_path / "b", "--questions", str(tmp_path / "empty.txt")),
        ),
        ("check the path", build(pictures, tmp_path / "c", "--questions", str(tmp_path / "no"))),
    ):
        assert status == 2
        assert message
    error = capsys.readouterr().err
    assert error.count("\n") == 4
    for message in ("folder of its own", "is no category", "one to a line", "check the path"):
        assert message in error
