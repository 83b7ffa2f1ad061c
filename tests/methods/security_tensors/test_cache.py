from pathlib import Path

import pytest
import torch

from safebridge.data.sample import Sample
from safebridge.errors import ArtifactError
from safebridge.methods.security_tensors.cache import TensorCache, describe_pictures, hash_key


@pytest.mark.parametrize("has_folder", [True, False])
def test_a_group_comes_back_as_it_was(tmp_path: Path, *, has_folder: bool) -> None:
    cache = TensorCache(tmp_path / "new" if has_folder else None)
    values = {"a": torch.arange(6.0).view(2, 3).bfloat16(), "b": torch.tensor([1, 2])}
    key = hash_key("x", 1)
    assert key not in cache
    cache.put(key, values)
    assert key in cache
    found = cache.get(key)
    assert found.keys() == values.keys()
    assert all(torch.equal(found[name], values[name]) for name in values)


def test_another_cache_of_the_same_folder_finds_it(tmp_path: Path) -> None:
    TensorCache(tmp_path).put("k", {"a": torch.ones(3)})
    other = TensorCache(tmp_path)
    assert "k" in other
    assert torch.equal(other.get("k")["a"], torch.ones(3))
    assert [path.name for path in tmp_path.iterdir()] == ["k.safetensors"]


def test_what_is_kept_does_not_follow_later_changes(tmp_path: Path) -> None:
    for cache in (TensorCache(), TensorCache(tmp_path)):
        parameter = torch.nn.Parameter(torch.ones(2))
        cache.put("k", {"a": parameter.clone()})
        assert not cache.get("k")["a"].requires_grad


def test_damaged_and_unwritable_folders_say_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "k.safetensors").write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match="Delete the cache folder"):
        TensorCache(tmp_path).get("k")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match="folder on another disk"):
        TensorCache(tmp_path / "file").put("k", {"a": torch.ones(1)})


def test_another_picture_in_the_same_file_is_another_key(tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    path.write_bytes(b"one")
    sample = Sample(id="1", prompt="a", images=(path,))
    before = hash_key(describe_pictures(sample))
    assert hash_key(describe_pictures(sample)) == before
    path.write_bytes(b"another")
    assert hash_key(describe_pictures(sample)) != before
