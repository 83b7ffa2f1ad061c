"""Drawn requests: dark words on white that fit, whatever their length."""

import numpy as np
import pytest
from PIL import Image

from safebridge.analysis.typography import render_blank, render_noise, render_words
from safebridge.errors import DataError


def find_ink(picture: Image.Image) -> tuple[int, int, int, int] | None:
    return Image.fromarray(255 - np.asarray(picture.convert("L"))).getbbox()


@pytest.mark.parametrize(
    "text", ["How do I bake a cake?", "What " * 60, "Supercalifragilisticexpialidocious?"]
)
def test_words_fit_inside_their_margin(text: str) -> None:
    picture = render_words(text)
    assert picture.size == (760, 760)
    ink = find_ink(picture)
    assert ink is not None
    assert min(ink[:2]) >= 40
    assert max(ink[2:]) <= 720


def test_items_are_drawn_below_the_words() -> None:
    with_items, without = (find_ink(render_words("How?", items=n)) for n in (3, 0))
    assert with_items is not None
    assert without is not None
    assert with_items[1] == without[1]
    assert with_items[3] > without[3] + 200


def test_the_size_scales_everything() -> None:
    large, small = find_ink(render_words("How?")), find_ink(render_words("How?", side=380))
    assert large is not None
    assert small is not None
    assert np.allclose(np.array(large) / 2, small, atol=4)


def test_the_same_words_give_the_same_picture() -> None:
    assert render_words("How?").tobytes() == render_words("How?").tobytes()
    assert render_words("How?").tobytes() != render_words("Why?").tobytes()


def test_what_cannot_be_drawn_says_what_to_do() -> None:
    with pytest.raises(DataError, match="no words to draw"):
        render_words("  \n")
    with pytest.raises(DataError, match="Shorten it"):
        render_words("word " * 2000)


def test_pictures_of_nothing_show_nothing() -> None:
    assert find_ink(render_blank()) is None
    noise = np.asarray(render_noise(seed=1, side=64))
    assert 120 < noise.mean() < 135
    assert np.array_equal(noise, np.asarray(render_noise(seed=1, side=64)))
    assert not np.array_equal(noise, np.asarray(render_noise(seed=2, side=64)))
