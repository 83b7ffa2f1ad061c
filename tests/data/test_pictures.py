import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from safebridge.data.pictures import (
    LabelledPicture,
    ask_about,
    load_questions,
    match_resolutions,
    read_pictures,
    resize_pictures,
)
from safebridge.data.sample import open_image
from safebridge.errors import DataError


def draw(path: Path, size: tuple[int, int] = (16, 16)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((size[1], size[0], 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for category in ("guns", "fruit"):
        for number in range(3):
            draw(tmp_path / "p" / category / "deep" / f"{number}.PNG")
    (tmp_path / "p" / "fruit" / "note.txt").write_text("no picture")
    draw(tmp_path / "p" / "loose.png")
    return tmp_path / "p"


def test_sub_folders_are_categories(folder: Path) -> None:
    found = read_pictures(folder, ["guns"])
    assert [(p.category, p.is_harmful) for p in found] == [("fruit", False)] * 3 + [
        ("guns", True)
    ] * 3


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_tables_are_read_in_each_form(tmp_path: Path, suffix: str) -> None:
    rows = [
        {"image": "a.png", "category": "guns", "is_harmful": "", "concept": "rifle", "style": "s"},
        {"image": "b.png", "category": "guns", "is_harmful": "no", "concept": "", "style": ""},
        {"image": "c.png", "category": "fruit", "is_harmful": "True", "concept": "", "style": ""},
    ]
    path = tmp_path / f"t{suffix}"
    if suffix == ".jsonl":
        rows[2]["is_harmful"] = True
        path.write_text("\n\n".join(json.dumps(row) for row in rows))
    else:
        sign = "\t" if suffix == ".tsv" else ","
        lines = [sign.join(rows[0])] + [sign.join(str(v) for v in row.values()) for row in rows]
        path.write_text("\n".join(lines))
    found = read_pictures(path, ["guns"])
    assert found == [
        LabelledPicture(tmp_path / "a.png", "guns", is_harmful=True, concept="rifle", style="s"),
        LabelledPicture(tmp_path / "b.png", "guns", is_harmful=False),
        LabelledPicture(tmp_path / "c.png", "fruit", is_harmful=True),
    ]


def test_bad_sources_say_what_to_do(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'knives' is no category of .*; found fruit, guns"):
        read_pictures(folder, ["knives"])
    with pytest.raises(DataError, match="one sub-folder per category"):
        read_pictures(folder / "guns" / "deep")
    cases = (
        ("image,kind\na.png,x\n", "row 1 has no 'category'"),
        ("image,category,is_harmful\na.png,x,maybe\n", "Write true or false"),
    )
    for text, message in cases:
        (tmp_path / "t.csv").write_text(text)
        with pytest.raises(DataError, match=message):
            read_pictures(tmp_path / "t.csv")
    (tmp_path / "t.jsonl").write_text("{")
    with pytest.raises(DataError, match="row 1 is no JSON "):
        read_pictures(tmp_path / "t.jsonl")
    with pytest.raises(DataError, match=r"Give a folder, or a \.csv"):
        read_pictures(tmp_path / "none.csv")


def test_twins_share_their_question_and_nearly_their_size(tmp_path: Path) -> None:
    sizes = [(16, 16), (64, 32), (200, 100)]
    pictures = [
        LabelledPicture(
            draw(tmp_path / f"{kind}{n}.png", (w + kind, h + kind)), str(kind), kind == 0
        )
        for kind in (0, 1)
        for n, (w, h) in enumerate(sizes)
    ]
    asked = ask_about(pictures, ["a?", "b?"], ["g?"], per_picture=2, seed=3)
    assert len(asked.harmful) == len(asked.benign) == 6
    for one, other in zip(asked.harmful, asked.benign, strict=True):
        assert one.prompt == other.prompt
        assert one.images[0].name[1:] == other.images[0].name[1:]
        assert one.is_harmful
        assert not other.is_harmful
    assert Counter(s.prompt for s in asked.harmful) == {"a?": 3, "b?": 3}
    assert len(asked.general) == 3
    assert {s.prompt for s in asked.general} == {"g?"}
    assert ask_about(pictures, ["a?", "b?"], ["g?"], per_picture=2, seed=3) == asked
    assert len({s.id for s in (*asked.harmful, *asked.benign, *asked.general)}) == 15


def test_general_questions_go_to_pictures_that_are_left_over(tmp_path: Path) -> None:
    pictures = [LabelledPicture(draw(tmp_path / "h.png"), "h", is_harmful=True)]
    pictures += [
        LabelledPicture(draw(tmp_path / f"{n}.png", (16 + 9 * n, 16)), "b", is_harmful=False)
        for n in range(3)
    ]
    asked = ask_about(pictures, ["a?"], ["g?"], per_picture=4)
    assert {s.images[0].name for s in asked.benign} == {"0.png"}
    assert {s.images[0].name for s in asked.general} == {"1.png", "2.png"}


def test_a_picture_is_matched_again_only_when_all_were(tmp_path: Path) -> None:
    first = [LabelledPicture(draw(tmp_path / f"h{n}.png"), "h", is_harmful=True) for n in range(5)]
    second = [
        LabelledPicture(draw(tmp_path / f"b{n}.png"), "b", is_harmful=False) for n in range(2)
    ]
    counts = Counter(match_resolutions(first, second))
    assert sorted(counts.values()) == [2, 3]
    with pytest.raises(DataError, match="no pictures to match with"):
        match_resolutions(first, [])


def test_a_triad_needs_both_kinds_and_questions(tmp_path: Path) -> None:
    picture = LabelledPicture(draw(tmp_path / "a.png"), "a", is_harmful=True)
    with pytest.raises(DataError, match="found 1 and 0"):
        ask_about([picture], ["a?"], ["b?"])
    other = LabelledPicture(draw(tmp_path / "b.png"), "b", is_harmful=False)
    with pytest.raises(DataError, match="no questions given"):
        ask_about([picture, other], [], ["b?"])


def test_resized_pictures_have_one_longest_side(tmp_path: Path) -> None:
    pictures = [
        LabelledPicture(
            draw(tmp_path / "a" / "x.png", (40, 20)), "c", is_harmful=True, concept="n", style="s"
        ),
        LabelledPicture(draw(tmp_path / "b" / "x.png", (10, 30)), "c", is_harmful=False),
    ]
    found = resize_pictures(pictures, tmp_path / "new", longest_side=10)
    assert [open_image(p.path).size for p in found] == [(10, 5), (3, 10)]
    assert [
        replace(new, path=old.path) for new, old in zip(found, pictures, strict=True)
    ] == pictures
    with pytest.raises(DataError, match="1 or more, found 0"):
        resize_pictures(pictures, tmp_path / "new", longest_side=0)


def test_our_questions_name_no_object_and_are_of_the_fit_split_alone() -> None:
    act, neutral = load_questions("act"), load_questions("neutral")
    assert len(act) == 34
    assert len(neutral) == 10
    assert not set(act) & set(neutral)
    assert all("this" in question for question in act)
