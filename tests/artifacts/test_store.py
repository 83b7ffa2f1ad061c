import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from safebridge.artifacts import store
from safebridge.artifacts.store import ArtifactMetadata, load_artifact, save_artifact
from safebridge.errors import ArtifactError

METADATA = ArtifactMetadata("a/model", "main", "3f9c2a1e", "triad", 7, {"losses": [1.5]})


def write(folder: Path, value: float = 1.0) -> Path:
    tensors = {"tokens": torch.full((2, 3), value)}
    return save_artifact(folder, kind="test", config={"n": 2}, tensors=tensors, metadata=METADATA)


def alter(folder: Path, **changes: Any) -> None:
    path = folder / "artifact.json"
    record = json.loads(path.read_text())
    record.update(changes)
    path.write_text(json.dumps({key: value for key, value in record.items() if value is not None}))


def test_an_artifact_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    found = load_artifact(write(tmp_path / "deep" / "folder"), kind="test")
    assert torch.equal(found.tensors["tokens"], torch.ones(2, 3))
    assert found.config == {"n": 2}
    assert found.metadata == METADATA


def test_saving_again_replaces_the_artifact_and_leaves_no_other_file(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "a", 2.0)
    assert load_artifact(tmp_path / "a", kind="test").tensors["tokens"][0, 0] == 2.0
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_save_leaves_the_earlier_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    write(tmp_path / "a")
    calls = []

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    def fail_second(path: Path, target: Path) -> None:
        calls.append(path)
        if len(calls) == 2:
            fail()
        os.rename(path, target)  # noqa: PTH104

    if step == "fsync":
        monkeypatch.setattr(store.os, "fsync", fail)
    else:
        monkeypatch.setattr(Path, "replace", fail_second)
    with pytest.raises(ArtifactError, match=r"No space left.*earlier artifact there is unchanged"):
        write(tmp_path / "a", 2.0)
    monkeypatch.undo()
    assert load_artifact(tmp_path / "a", kind="test").tensors["tokens"][0, 0] == 1.0
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_place_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ArtifactError, match=r"Permission denied.*choose a folder"):
        write(tmp_path / "a")


def test_a_place_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match="choose a folder you may write to"):
        write(tmp_path / "file" / "a")


def test_a_folder_with_other_files_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ArtifactError, match=r"thesis\.tex.*folder of its own"):
        write(tmp_path)
    assert (tmp_path / "thesis.tex").exists()
    with pytest.raises(ArtifactError, match="is a file"):
        write(tmp_path / "thesis.tex")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, r"unknown keys \['seed'\]"),
        ({"config": None}, r"missing keys \['config'\]"),
        ({"config": []}, "'config' is no table"),
        ({"format_version": 99}, "format version 99.*Install the version that wrote it"),
        ({"kind": "other"}, "is of kind 'other', expected 'test'"),
        ({"metadata": {}}, "missing metadata"),
        ({"tensors_sha256": "0" * 64}, "damaged or was altered"),
        ({"tensors": {}}, r"unknown tensors \['tokens'\]"),
        ({"tensors": {"tokens": {"shape": [2, 4], "dtype": "float32"}}}, "tensor 'tokens' is"),
    ],
)
def test_an_altered_artifact_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    alter(write(tmp_path / "a"), **changes)
    with pytest.raises(ArtifactError, match=message):
        load_artifact(tmp_path / "a", kind="test")


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    with pytest.raises(ArtifactError, match="Give a folder written by save"):
        load_artifact(tmp_path / "none", kind="test")
    shutil.copytree(folder, tmp_path / "b")
    (tmp_path / "b" / "tensors.safetensors").unlink()
    with pytest.raises(ArtifactError, match="Copy the whole artifact folder"):
        load_artifact(tmp_path / "b", kind="test")
    (folder / "artifact.json").write_text("{")
    with pytest.raises(ArtifactError, match="is no JSON"):
        load_artifact(folder, kind="test")
    (folder / "artifact.json").write_text("[]")
    with pytest.raises(ArtifactError, match="is no artifact"):
        load_artifact(folder, kind="test")


def test_saving_leaves_the_tensors_as_they_were(tmp_path: Path) -> None:
    tensor = torch.randn(3, 4, requires_grad=True)
    before = tensor.detach().clone()
    save_artifact(
        tmp_path / "a", kind="test", config={}, tensors={"x": tensor.T}, metadata=METADATA
    )
    assert torch.equal(tensor, before)
    assert tensor.requires_grad
    found = load_artifact(tmp_path / "a", kind="test").tensors["x"]
    assert torch.equal(found, before.T)
