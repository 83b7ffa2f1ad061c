"""`safebridge fit text-guided-alignment`, on a tiny model."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from safebridge.cli.main import main
from safebridge.data.sample import Sample
from safebridge.methods.text_guided_alignment.llava_json import LlavaFile, write_llava
from safebridge.methods.text_guided_alignment.method import TextGuidedAlignment
from safebridge.testing.tiny import tiny_vlm

QUICK = ["--batch-size", "3", "--max-steps", "2", "--layers", "1-2"]
NAMES = ("cat", "dog", "cup", "bicycle")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    random, samples = np.random.default_rng(0), []
    for number, name in enumerate(NAMES):
        path = tmp_path / f"{name}.png"
        Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
        samples.append(Sample(str(number), "What?", (path,), f"A {name}."))
    return write_llava(samples, tmp_path / "train.json")


def fit(data: Path, out: Path, *more: str) -> int:
    words = ["fit", "text-guided-alignment", "--model", "tiny/llava", "--data", str(data)]
    return main([*words, "--out", str(out), *more])


def test_captions_and_retrieved_texts_are_added_and_kept(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    captions = {f"{name}.png": f"A picture of a {name}." for name in NAMES}
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    out = tmp_path / "aligned"
    more = ["--captions", str(tmp_path / "captions.json"), "--corpus", "captions"]
    assert fit(data, out, *QUICK, *more) == 0
    guided = list(LlavaFile(tmp_path / "aligned-guided.json"))
    assert [sample.caption for sample in guided] == list(captions.values())
    assert all(sample.retrieved in captions.values() for sample in guided)
    assert all(sample.retrieved != sample.caption for sample in guided)
    method = TextGuidedAlignment.load(out, tiny_vlm("llava"))
    assert method.config.layers == "1-2"
    assert {"answer", "align", "pair", "cosine"} <= set(method.metadata.details["losses"][-1])
    assert f"artifact: {out}" in capsys.readouterr().out


def test_a_guided_file_is_fitted_as_it_is(data: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "texts.txt"
    corpus.write_text("A dog.\nA horse.\n")
    guided = tmp_path / "guided.json"
    more = ["--captions", "model", "--corpus", str(corpus), "--embedder", "states"]
    assert fit(data, tmp_path / "a", *QUICK, *more, "--guided", str(guided)) == 0
    assert fit(guided, tmp_path / "b", *QUICK) == 0
    first, second = (
        TextGuidedAlignment.load(tmp_path / name, tiny_vlm("llava")) for name in ("a", "b")
    )
    for name, value in first.tensors.items():
        assert value.equal(second.tensors[name])


def test_a_plan_fits_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(data, tmp_path / "a", "--plan", "--image-tokens", "16", "--teraflops", "1") == 0
    out = capsys.readouterr().out
    assert "memory" in out
    assert "at 1.00 teraflop/s" in out
    assert not (tmp_path / "a").exists()


def test_a_missing_corpus_is_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--captions", "model", "--corpus", str(tmp_path / "gone.txt")]
    assert fit(data, tmp_path / "a", *QUICK, *more) == 2
    error = capsys.readouterr().err
    assert "cannot read texts" in error
    assert error.count("\n") == 1
