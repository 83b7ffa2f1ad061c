import pytest

from safebridge.data.sample import open_image
from safebridge.data.tables import load_requests, load_splits
from safebridge.data.twins import KINDS, load_pictures, load_samples, manifest_sha256
from safebridge.errors import DataError, UnknownNameError


@pytest.mark.parametrize("kind", KINDS)
def test_samples_come_from_the_styles_and_templates_of_their_split(kind: str) -> None:
    splits = load_splits()
    for sample in load_samples(kind, "test", limit=60):
        assert sample.style in ("", *splits["styles"]["test"])
        if sample.concept:
            assert sample.template in splits["requests"]["test"]


def test_ids_are_unique_within_a_kind() -> None:
    ids = [sample.id for sample in load_samples("harmful_image", "test")]
    assert len(ids) == len(set(ids))


def test_picture_twins_have_the_same_wording_whether_harmful_or_not() -> None:
    harmful = {s.prompt for s in load_samples("harmful_image", "test")}
    benign = {s.prompt for s in load_samples("benign_image", "test")}
    assert harmful == benign


def test_a_text_twin_names_the_object_of_the_picture_twin() -> None:
    text = load_samples("harmful_text", "test", limit=1)[0]
    assert text.prompt.startswith(load_requests()[text.template].text.partition("{}")[0])
    assert text.images == ()


def test_a_limit_takes_every_concept_before_any_comes_twice() -> None:
    samples = load_samples("benign_image", "test", limit=100)
    assert len({sample.concept for sample in samples}) == 100


def test_the_same_seed_gives_the_same_samples_and_another_seed_others() -> None:
    first = load_samples("naming", "test", limit=20, seed=1)
    assert load_samples("naming", "test", limit=20, seed=1) == first
    assert load_samples("naming", "test", limit=20, seed=2) != first


def test_unseen_categories_are_apart_from_the_seen_ones() -> None:
    seen = {s.category for s in load_samples("harmful_image", "fit", categories="seen")}
    unseen = {s.category for s in load_samples("harmful_image", "test", categories="unseen")}
    assert seen
    assert unseen
    assert not seen & unseen


def test_harmless_kinds_have_no_seen_categories() -> None:
    with pytest.raises(DataError, match="apply to harmful concepts only"):
        load_samples("benign_image", "test", categories="seen")


@pytest.mark.parametrize(
    ("kind", "split", "categories", "message"),
    [
        ("harmful_pictures", "test", "all", "no kind of samples 'harmful_pictures'"),
        ("naming", "train", "all", "no split 'train'"),
        ("naming", "test", "held-out", "no group of categories 'held-out'"),
    ],
)
def test_unknown_names_are_refused(kind: str, split: str, categories: str, message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        load_samples(kind, split, categories=categories)


def test_every_picture_opens_at_the_size_the_tower_reads() -> None:
    for picture in load_pictures()[::101]:
        assert open_image(picture.path).size == (224, 224)


def test_the_manifest_has_one_hash() -> None:
    assert len(manifest_sha256()) == 64
