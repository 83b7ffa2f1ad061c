import csv
import hashlib
import json
from importlib.resources import files

import pytest

from safebridge.data import tables
from safebridge.data.tables import is_seen, load_concepts, load_requests, load_splits, names_of
from safebridge.errors import DataError, UnknownNameError


def test_every_request_stands_in_exactly_one_split() -> None:
    listed = [name for part in load_splits()["requests"].values() for name in part]
    assert sorted(listed) == sorted(load_requests())


def test_at_least_forty_act_templates_are_split_between_fitting_and_testing() -> None:
    acts = {name for name, request in load_requests().items() if request.kind == "act"}
    splits = load_splits()["requests"]
    assert len(acts) >= 40
    assert len(acts & set(splits["test"])) >= 10
    assert len(acts & set(splits["fit"])) >= 25


def test_at_least_two_styles_and_three_categories_are_held_out() -> None:
    splits = load_splits()
    assert len(splits["styles"]["test"]) >= 2
    assert len(splits["categories"]["unseen"]) >= 3


def test_every_harmful_category_is_seen_or_unseen() -> None:
    categories = {c.category for c in load_concepts().values() if c.is_harmful}
    parts = load_splits()["categories"]
    assert categories == {*parts["seen"], *parts["unseen"]}


def test_a_name_in_two_parts_of_a_split_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    twice = json.dumps({"styles": {"fit": ["noto"], "test": ["noto"]}})
    monkeypatch.setattr(tables, "_read", lambda _name: twice)
    with pytest.raises(DataError, match="noto in two parts of 'styles'; keep each name"):
        load_splits.__wrapped__()


def test_a_concept_answers_to_its_own_name_first() -> None:
    assert names_of("pistol")[0] == "pistol"
    assert "revolver" in names_of("pistol")


def test_an_unknown_concept_gets_the_nearest_name() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'pistol'"):
        names_of("pistl")


def test_an_unknown_category_is_refused() -> None:
    assert is_seen("weapons")
    assert not is_seen("drugs")
    with pytest.raises(UnknownNameError, match="no category 'weapon'"):
        is_seen("weapon")


def test_text_twins_name_the_object_and_picture_twins_do_not() -> None:
    for request in load_requests().values():
        assert "{}" not in request.picture
        assert ("{}" in request.text) == (request.kind != "naming")


def test_every_shipped_picture_is_the_one_of_the_manifest() -> None:
    folder = files("safebridge.data") / "mini"
    rows = list(csv.DictReader((folder / "manifest.csv").read_text("utf-8").splitlines()))
    found = {path.name for path in (folder / "pictures").iterdir()}
    assert {row["file"] for row in rows} == found
    for row in rows[::37]:
        content = (folder / "pictures" / row["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == row["sha256"]


def test_no_shipped_picture_has_a_share_alike_licence() -> None:
    text = (files("safebridge.data") / "mini" / "manifest.csv").read_text("utf-8")
    licences = {row["licence"] for row in csv.DictReader(text.splitlines())}
    assert licences <= {"Apache-2.0", "MIT", "CC-BY-4.0", "CC-BY-3.0"}
