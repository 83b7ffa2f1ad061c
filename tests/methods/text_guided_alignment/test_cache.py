from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from safebridge.errors import ArtifactError
from safebridge.methods.text_guided_alignment.cache import TextStateCache, cache_bytes

TEXTS = ["a", "bb", "ccc", "bb"]
SHAPE = (2, 3)


class Reader:
    """States that say which text they are of; notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def __call__(self, texts: Sequence[str]) -> Tensor:
        self.asked.append(list(texts))
        return torch.stack([torch.full(SHAPE, float(len(text))) for text in texts], dim=1)


def test_states_come_back_in_the_order_asked_for() -> None:
    cache, read = TextStateCache(None, TEXTS, SHAPE), Reader()
    found = cache.look_up(["ccc", "a", "bb", "a"], read)
    assert found.shape == (2, 4, 3)
    assert found[0, :, 0].tolist() == [3, 1, 2, 1]


def test_each_text_is_read_once() -> None:
    cache, read = TextStateCache(None, TEXTS, SHAPE), Reader()
    cache.look_up(["a", "bb"], read)
    cache.look_up(["bb", "ccc"], read)
    cache.look_up(TEXTS, read)
    assert read.asked == [["a", "bb"], ["ccc"]]
    assert len(cache) == cache.filled == 3


def test_a_folder_is_used_again_with_the_same_key(tmp_path: Path) -> None:
    first, read = Reader(), Reader()
    TextStateCache(tmp_path, TEXTS, SHAPE, key="model").look_up(["a"], first)
    again = TextStateCache(tmp_path, TEXTS, SHAPE, key="model")
    assert again.look_up(["a"], read)[0, 0, 0] == 1
    assert read.asked == []


@pytest.mark.parametrize(
    "other",
    [
        {"key": "other"},
        {"key": "model", "shape": (3, 3)},
        {"key": "model", "texts": ["a"]},
        {"key": "model", "dtype": "float16"},
    ],
)
def test_anything_else_empties_the_folder(tmp_path: Path, other: dict[str, object]) -> None:
    TextStateCache(tmp_path, TEXTS, SHAPE, key="model").look_up(["a"], Reader())
    given = {"texts": TEXTS, "shape": SHAPE} | other
    assert TextStateCache(tmp_path, **given).filled == 0


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("float16", 2), ("bfloat16", 2)])
def test_the_size_on_disk_is_the_planned_one(tmp_path: Path, dtype: str, size: int) -> None:
    cache = TextStateCache(tmp_path, TEXTS, SHAPE, dtype=dtype)
    cache.look_up(TEXTS, Reader())
    assert (tmp_path / "states.bin").stat().st_size == 3 * 2 * 3 * size
    assert cache_bytes(3, *SHAPE, dtype) == 3 * 2 * 3 * size
    assert cache.look_up(["ccc"], Reader()).dtype == torch.float32


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="that you may write to"):
        TextStateCache(tmp_path / "file", TEXTS, SHAPE)
