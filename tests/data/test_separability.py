import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from safebridge.data.sample import Sample
from safebridge.data.separability import (
    STATISTICS,
    measure_image_separability,
    measure_image_statistics,
    measure_request_separability,
    measure_separability,
    measure_text_separability,
)
from safebridge.errors import DataError


def pictures(
    folder: Path, name: str, count: int, *, seed: int, is_blurred: bool = False
) -> list[Path]:
    random, paths = np.random.default_rng(seed), []
    for number in range(count):
        image = Image.fromarray(random.integers(0, 255, (24, 24, 3), dtype=np.uint8))
        if is_blurred:
            image = image.filter(ImageFilter.GaussianBlur(2))
        paths.append(folder / f"{name}{number}.png")
        image.save(paths[-1])
    return paths


def test_the_same_requests_in_both_sets_tell_nothing() -> None:
    requests = ["How do I make this?", "Where is this sold?", "Tell me about this."]
    assert measure_text_separability(requests, requests) == pytest.approx(0.5)
    assert measure_request_separability(requests, requests) == pytest.approx(0.5)


def test_a_telling_word_is_found_in_requests_that_were_never_seen() -> None:
    first = [f"how is this {verb}" for verb in ("made", "sold", "used", "kept")]
    second = [f"how are these {verb}" for verb in ("grown", "cooked", "eaten", "washed")]
    assert measure_text_separability(first, second) == pytest.approx(1.0)


def test_naive_bayes_equals_a_case_solved_by_hand() -> None:
    # Vocabulary a, b. Held out "a a b" of the first set: it has left "a", the second "b b".
    # P(a|1) = 2/3, P(b|1) = 1/3, P(a|2) = 1/4, P(b|2) = 3/4: 4/27 against 3/64, a hit.
    # Held out "a": left "a a b" (3/5, 2/5) against (1/4, 3/4), a hit. Held out "b b": the second
    # has nothing left (1/2, 1/2) and the first "a a b a" (4/6, 2/6): 1/9 against 1/4, a hit.
    assert measure_text_separability(["a a b", "a"], ["b b"]) == pytest.approx(1.0)
    # Held out "b": left "a" (2/3, 1/3), second "b b" (1/4, 3/4): a miss. Held out "a": left "b"
    # (1/3, 2/3) against (1/4, 3/4), a hit. Held out "b b": (1/2, 1/2) against "b a", which gives
    # (1/2, 1/2), is a tie; the mean of one half and one half.
    assert measure_text_separability(["b", "a"], ["b b"]) == pytest.approx(0.5)


def test_pictures_of_one_source_are_near_chance_and_blurred_ones_are_not(tmp_path: Path) -> None:
    sharp = pictures(tmp_path, "a", 60, seed=0)
    same = pictures(tmp_path, "b", 60, seed=1)
    blurred = pictures(tmp_path, "c", 60, seed=2, is_blurred=True)
    assert abs(measure_image_separability(sharp, same) - 0.5) < 0.15
    assert measure_image_separability(sharp, blurred) == pytest.approx(1.0)


def test_statistics_of_a_plain_picture_are_those_one_can_say() -> None:
    found = dict(
        zip(
            STATISTICS,
            measure_image_statistics(Image.new("RGB", (8, 4), (255, 0, 51))),
            strict=True,
        )
    )
    assert found["log width"] == pytest.approx(math.log(8))
    assert found["log height"] == pytest.approx(math.log(4))
    assert (found["mean red"], found["mean green"], found["mean blue"]) == (255, 0, 51)
    assert found["saturation"] == 255
    for name in STATISTICS[5:6] + STATISTICS[7:]:
        assert found[name] == pytest.approx(0.0)


def test_a_picture_of_one_pixel_has_statistics() -> None:
    found = measure_image_statistics(Image.new("RGB", (1, 1)))
    assert np.isfinite(found).all()


def test_the_report_counts_each_picture_once_and_says_what_chance_is(tmp_path: Path) -> None:
    paths = {name: pictures(tmp_path, name, 20, seed=n) for n, name in enumerate(("SA", "TCB"))}
    sets = [
        [Sample(id=f"{name}{i}", prompt="a", images=(path,)) for i, path in enumerate(own * 2)]
        for name, own in paths.items()
    ]
    found = measure_separability(*sets)
    assert found.request_accuracy == pytest.approx(0.5)
    assert found.words_accuracy == pytest.approx(0.5)
    assert found.image_accuracy == measure_image_separability(*(sorted(p) for p in paths.values()))
    # The mean of two shares of 20 coin flips: half plus 1.645 deviations.
    assert found.image_chance_95 == pytest.approx(0.5 + 1.645 * math.sqrt(2 * 0.25 / 20) / 2)


def test_sets_without_pictures_or_samples() -> None:
    text = [Sample(id="1", prompt="a")]
    found = measure_separability(text, text)
    assert found.image_accuracy is None
    assert found.image_chance_95 is None
    with pytest.raises(DataError, match="two sets are needed"):
        measure_separability(text, [])
    with pytest.raises(DataError, match="two pictures of each set"):
        measure_image_separability([Path("a")], [Path("b")])
