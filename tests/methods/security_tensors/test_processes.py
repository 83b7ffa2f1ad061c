"""Several processes, started as `accelerate launch` starts them, fit what one process fits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from safebridge.data.files import save_samples
from safebridge.data.sample import Sample
from safebridge.methods.security_tensors.method import SecurityTensors
from safebridge.testing.tiny import tiny_vlm

OPTIONS = ["--num-virtual-tokens", "2", "--batch-size", "3", "--epochs", "3", "--benign-loss", "kl"]


def launch(processes: int, data: Path, out: Path) -> SecurityTensors:
    words = ["-m", "safebridge", "fit", "security-tensors", "--model", "tiny/llava"]
    words += ["--data", str(data), "--out", str(out), *OPTIONS]
    if processes > 1:
        # `accelerate launch` starts torch's launcher for GPUs, and CPUs by MPI alone.
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                 str(processes), *words]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(  # noqa: S603 - our own command
        [sys.executable, *words], check=False, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("artifact:") == 1  # one of them speaks for all
    return SecurityTensors.load(out, tiny_vlm("llava"))


@pytest.mark.parametrize("processes", [2])
def test_any_number_of_processes_fits_the_same_tensor(
    triad: list[Sample], tmp_path: Path, processes: int
) -> None:
    data = save_samples(triad, tmp_path / "triad.jsonl")
    one = launch(1, data, tmp_path / "one")
    several = launch(processes, data, tmp_path / "several")
    torch.testing.assert_close(
        several.tensors["tokens"], one.tensors["tokens"], atol=1e-4, rtol=1e-3
    )
    assert several.metadata.details["steps"] == one.metadata.details["steps"]
    for found, expected in zip(
        several.metadata.details["losses"], one.metadata.details["losses"], strict=True
    ):
        assert found == pytest.approx(expected, abs=1e-3)
