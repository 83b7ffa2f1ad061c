"""`safebridge fit activation-revision`: samples in, artifact out."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from safebridge.cli.main import main
from safebridge.data.files import save_samples
from safebridge.data.sample import Sample
from safebridge.methods.activation_revision.method import ActivationRevision
from safebridge.methods.activation_revision.samples import build_single_response
from safebridge.testing.tiny import tiny_vlm


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    random, found = np.random.default_rng(0), []
    for number in range(10):
        path = tmp_path / f"{number}.png"
        Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
        found.append(
            Sample(id=f"s{number}", prompt="How?", images=(path,), is_harmful=number % 2 == 0)
        )
    return found


def fit(data: Path, out: Path, *more: str) -> int:
    words = ["fit", "activation-revision", "--model", "tiny/llava", "--data", str(data)]
    return main([*words, "--out", str(out), *more])


@pytest.mark.parametrize(
    "strategy", ["single-response", "multi-response", "multi-instruction", "reminder"]
)
def test_a_fit_saves_an_artifact_that_loads(
    samples: list[Sample], tmp_path: Path, capsys: pytest.CaptureFixture[str], strategy: str
) -> None:
    data, out = save_samples(samples, tmp_path / "data.jsonl"), tmp_path / "artifact"
    assert fit(data, out, "--strategy", strategy, "--top-k", "2", "--responses", "1") == 0
    method = ActivationRevision.load(out, tiny_vlm("llava"))
    assert method.metadata.details["groups"] == 5
    assert len(method.sites) == 2
    assert "fitted on 5 groups" in capsys.readouterr().out


def test_groups_can_be_given_and_a_gate_takes_the_harmless_requests(
    samples: list[Sample], tmp_path: Path
) -> None:
    groups = build_single_response(
        [s for s in samples if s.is_harmful], refusal="No.", opener="OK."
    )
    data = save_samples(groups, tmp_path / "groups.jsonl")
    benign = [replace(s, prompt=f"What {n}?", is_harmful=False) for n, s in enumerate(samples)]
    more = ["--benign", str(save_samples(benign, tmp_path / "benign.jsonl")), "--gate", "cosine"]
    wide = ["--harmful", str(save_samples([Sample("m", "How come?")], tmp_path / "more.jsonl"))]
    gates = []
    for name, words in (("artifact", more), ("wide", [*more, *wide])):
        assert fit(data, tmp_path / name, "--strategy", "given", *words) == 0
        gates.append(ActivationRevision.load(tmp_path / name, tiny_vlm("llava")).gate)
    assert gates[0] is not None
    assert gates[1] is not None
    assert not torch.equal(gates[0].weight, gates[1].weight)


def test_errors_exit_with_what_to_do(
    samples: list[Sample], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    harmful = [s for s in samples if s.is_harmful]
    data = save_samples(harmful, tmp_path / "data.jsonl")
    assert fit(data, tmp_path / "a", "--strategy", "multi-instruction") == 2
    assert "use another --strategy" in capsys.readouterr().err
    assert fit(data, tmp_path / "a", "--responses", "0") == 2
    assert "must be 1 or more" in capsys.readouterr().err
    for option in ("--benign", "--harmful"):  # would be read by nothing
        assert fit(data, tmp_path / "a", option, str(data)) == 2
        assert "Give --gate probe" in capsys.readouterr().err
