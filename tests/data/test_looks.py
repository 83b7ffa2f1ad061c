import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from safebridge.data.looks import draw_look, draw_looks
from safebridge.data.sample import Sample, open_image
from safebridge.errors import DataError


def drawing(path: Path) -> Path:
    image = Image.new("RGB", (48, 40), (250, 250, 250))
    ImageDraw.Draw(image).rectangle((10, 8, 30, 24), fill=(200, 30, 40))
    image.save(path)
    return path


def test_a_look_keeps_the_size_and_changes_the_picture(tmp_path: Path) -> None:
    image = open_image(drawing(tmp_path / "a.png"))
    before = np.asarray(image).copy()
    look = draw_look(image, random.Random(0))
    assert (look.size, look.mode) == (image.size, "RGB")
    assert not np.array_equal(np.asarray(look), before)
    assert np.array_equal(np.asarray(image), before)


def test_the_thing_is_still_there(tmp_path: Path) -> None:
    image = open_image(drawing(tmp_path / "a.png"))
    for seed in range(20):
        pixels = np.asarray(draw_look(image, random.Random(seed))).astype(int)
        paper = pixels[0, 0]
        share = (np.abs(pixels - paper).sum(axis=2) > 40).mean()
        assert 0.02 < share < 0.4


def test_each_sample_gets_a_look_of_its_own(tmp_path: Path) -> None:
    path = drawing(tmp_path / "a.png")
    samples = [Sample("a", "x?", (path,)), Sample("b", "y?", (path, path)), Sample("c", "z?")]
    found = draw_looks(samples, tmp_path / "looks", seed=3)
    assert [len(sample.images) for sample in found] == [1, 2, 0]
    assert [(s.id, s.prompt) for s in found] == [(s.id, s.prompt) for s in samples]
    contents = {file.read_bytes() for sample in found for file in sample.images}
    assert len(contents) == 3
    assert samples[0].images == (path,)


def test_looks_depend_on_seed_and_sample_alone(tmp_path: Path) -> None:
    samples = [Sample("a", "x?", (drawing(tmp_path / "a.png"),))]
    same = [draw_looks(samples, tmp_path / name, seed=1)[0].images[0] for name in ("p", "q")]
    other = draw_looks(samples, tmp_path / "r", seed=2)[0].images[0]
    assert same[0].read_bytes() == same[1].read_bytes() != other.read_bytes()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    samples = [Sample("a", "x?", (drawing(tmp_path / "a.png"),))]
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write the picture .*file.*Name a folder"):
        draw_looks(samples, tmp_path / "file")
