from pathlib import Path

import pytest
from PIL import Image

from safebridge.data.sample import Sample, open_image, open_images, with_answer
from safebridge.errors import DataError


@pytest.fixture
def noise() -> Image.Image:
    return Image.effect_noise((64, 64), 40).convert("RGB")


def test_a_picture_opens_as_rgb(tmp_path: Path, noise: Image.Image) -> None:
    noise.convert("L").save(tmp_path / "grey.png")
    found = open_image(tmp_path / "grey.png")
    assert found.mode == "RGB"
    assert found.size == (64, 64)


def test_transparent_pixels_are_put_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_image(str(tmp_path / "clear.png")).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_truncated_picture_is_named(tmp_path: Path, noise: Image.Image, suffix: str) -> None:
    path = tmp_path / f"half.{suffix}"
    noise.save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=rf"half\.{suffix} is damaged or truncated.*again"):
        open_image(path)


def test_what_is_no_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "note.png").write_text("hello")
    with pytest.raises(DataError, match=r"note\.png is not a picture.*Give a PNG"):
        open_image(tmp_path / "note.png")
    with pytest.raises(DataError, match=r"none\.png: no such file. Check the path"):
        open_image(tmp_path / "none.png")
    with pytest.raises(DataError, match="it is a folder"):
        open_image(tmp_path)


def test_messages_stay_on_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        open_image(tmp_path / "none.png")
    assert "\n" not in str(caught.value)


def test_a_sample_is_named_when_its_picture_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="sample 'a7': cannot open picture"):
        open_images(Sample(id="a7", prompt="?", images=(tmp_path / "x.png",)))
    assert open_images(Sample(id="a8", prompt="?")) == []


def test_a_new_answer_leaves_the_old_sample() -> None:
    old = Sample(id="1", prompt="?", answer="a", set_name="GB")
    assert with_answer(old, "b") == Sample(id="1", prompt="?", answer="b", set_name="GB")
    assert with_answer(old, "b", "SA").set_name == "SA"
    assert old.answer == "a"
