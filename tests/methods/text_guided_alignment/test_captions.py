import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from safebridge.data.sample import Sample
from safebridge.errors import DataError
from safebridge.methods.text_guided_alignment.captions import (
    FileCaptioner,
    ModelCaptioner,
    add_captions,
)
from safebridge.models.load import VLM

SAMPLES = [
    Sample("a", "Why?", (Path("/p/a.png"),)),
    Sample("b", "Why?", ()),
    Sample("c", "Why?", (Path("/p/c.png"),), caption="known"),
]


def by_id(samples: Sequence[Sample]) -> list[str]:
    return [f"caption of {sample.id}" for sample in samples]


def test_only_pictures_without_a_caption_get_one() -> None:
    found = list(add_captions(SAMPLES, by_id))
    assert [sample.caption for sample in found] == ["caption of a", "", "known"]
    assert SAMPLES[0].caption == ""


def test_captions_are_made_as_the_samples_come() -> None:
    taken = []

    def endless() -> Iterator[Sample]:
        for number in range(10_000):
            taken.append(number)
            yield Sample(str(number), "Why?", (Path("x.png"),))

    first = next(add_captions(endless(), by_id))
    assert first.caption == "caption of 0"
    assert len(taken) < 1_000


def test_a_captioner_must_answer_every_sample() -> None:
    with pytest.raises(DataError, match="one for each"):
        list(add_captions(SAMPLES, lambda _: []))


@pytest.mark.parametrize("name", ["a", "a.png", "/p/a.png"])
def test_captions_of_a_file_are_found_by_id_name_or_path(tmp_path: Path, name: str) -> None:
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({name: "A cat"}))
    assert FileCaptioner(path)(SAMPLES[:1]) == ["A cat"]
    path.write_text(json.dumps({"image": name, "caption": "A cat"}) + "\n\n")
    assert FileCaptioner(path)(SAMPLES[:1]) == ["A cat"]


def test_a_picture_without_a_caption_in_the_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "captions.json"
    path.write_text("{}")
    with pytest.raises(DataError, match=r"Add one under any of: /p/a\.png, a\.png, a"):
        FileCaptioner(path)(SAMPLES[:1])


@pytest.mark.parametrize("text", ["no json", "[1, 2]", '[{"image": "a"}]'])
def test_a_file_of_another_form_says_what_is_expected(tmp_path: Path, text: str) -> None:
    path = tmp_path / "captions.json"
    path.write_text(text)
    with pytest.raises(DataError, match='JSON lines with "image" and "caption"'):
        FileCaptioner(path)


def test_a_model_captions_its_own_pictures(
    tiny: Callable[[str], VLM], pictures: list[Path]
) -> None:
    samples = [Sample(str(n), "Why?", (path,)) for n, path in enumerate(pictures[:2])]
    captioner = ModelCaptioner(tiny("llava"), request="Say.", max_new_tokens=3)
    captions = [sample.caption for sample in add_captions(samples, captioner)]
    assert captions == captioner(samples)
    assert len(captions) == 2
