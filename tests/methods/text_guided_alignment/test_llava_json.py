import json
from pathlib import Path
from typing import Any

import pytest

from safebridge.data.sample import Sample
from safebridge.errors import DataError
from safebridge.methods.text_guided_alignment import llava_json
from safebridge.methods.text_guided_alignment.llava_json import LlavaFile, write_llava


def record(name: str, **more: Any) -> dict[str, Any]:
    turns = [
        {"from": "human", "value": f"<image>\nWhat is {name}?"},
        {"from": "gpt", "value": "A tree."},
        {"from": "human", "value": "How tall?"},
        {"from": "gpt", "value": "Tall."},
    ]
    return {"id": name, "image": f"{name}.png", "conversations": turns, **more}


RECORDS = [
    record("oak", image_caption="An oak tree, größer: \u6a39.", retrieved_caption="A maple."),
    record("tox-elm"),
    {"id": "text", "conversations": record("x")["conversations"]},
]


@pytest.fixture(params=["list", "indented", "lines"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "train.json"
    if request.param == "lines":
        text = "\r\n".join(json.dumps(each, ensure_ascii=False) for each in RECORDS)
    else:
        indent = 1 if request.param == "indented" else None
        text = json.dumps(RECORDS, ensure_ascii=request.param == "list", indent=indent)
    path.write_text(text, encoding="utf-8", newline="")
    return path


@pytest.mark.parametrize("chunk", [1 << 20, 7], ids=["whole", "pieces"])
def test_records_are_read_one_by_one(
    file: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(llava_json, "_CHUNK", chunk)
    samples = LlavaFile(file, image_folder="/pictures")
    assert len(samples) == 3
    assert samples[0] == Sample(
        id="oak",
        prompt="What is oak?",
        images=(Path("/pictures/oak.png"),),
        answer="A tree.",
        caption="An oak tree, größer: \u6a39.",
        retrieved="A maple.",
    )
    assert [sample.id for sample in samples] == ["oak", "tox-elm", "text"]
    assert samples[-1].images == ()
    assert [sample.id for sample in samples[1:]] == ["tox-elm", "text"]


def test_all_turns_become_samples_of_their_own(file: Path) -> None:
    samples = LlavaFile(file, turns="all")
    assert [sample.id for sample in samples[:3]] == ["oak/0", "oak/1", "tox-elm/0"]
    assert (samples[1].prompt, samples[1].answer) == ("How tall?", "Tall.")
    assert samples[1].images == samples[0].images


def test_marked_records_lose_the_picture_that_is_there_for_the_loader(file: Path) -> None:
    assert LlavaFile(file)[1].images
    assert not LlavaFile(file, text_only_mark="tox")[1].images


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    samples = [
        Sample("a", "Why?", (tmp_path / "pictures/a.png",), "So.", caption="ä", retrieved="b"),
        Sample("b", "How?", (), "Thus."),
        Sample("c", "Both?", (tmp_path / "1.png", Path("/other/2.png")), "Yes."),
    ]
    path = write_llava(iter(samples), tmp_path / "out.json")
    assert list(LlavaFile(path)) == samples
    written = json.loads(path.read_text("utf-8"))
    assert written[0]["image"] == "pictures/a.png"
    assert written[0]["conversations"][0]["value"] == "<image>\nWhy?"
    assert {"image_caption", "retrieved_caption"} <= set(written[0])
    assert list(tmp_path.glob(".*")) == []


def test_nothing_is_a_list_too(tmp_path: Path) -> None:
    assert list(LlavaFile(write_llava([], tmp_path / "out.json"))) == []


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ('[{"id": 1, "conversations": []}, {"id": ', "one object per line"),
        ('[{"conversations": []}]', 'Expected an object with "id"'),
        ('[{"id": 1, "conversations": "hello"}]', "has no conversations"),
        ('[{"id": 1, "conversations": [{"value": 3}]}]', "has no conversations"),
    ],
)
def test_files_that_are_no_such_list_say_what_is_expected(
    tmp_path: Path, text: str, advice: str
) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(DataError, match=advice):
        LlavaFile(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.json"):
        LlavaFile(tmp_path / "gone.json")


def test_the_index_of_many_samples_is_small(tmp_path: Path) -> None:
    path = tmp_path / "many.json"
    path.write_text(json.dumps([record(str(number)) for number in range(2_000)]))
    samples = LlavaFile(path)
    assert len(samples) == 2_000
    assert samples[1_234].id == "1234"
    held = (samples._starts, samples._lengths, samples._turns)
    assert sum(part.itemsize for part in held) * len(samples) < 50_000
