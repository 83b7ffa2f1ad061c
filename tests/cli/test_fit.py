import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from safebridge.cli.main import main
from safebridge.data.files import save_samples
from safebridge.data.sample import Sample
from safebridge.methods.security_tensors.method import SecurityTensors
from safebridge.testing.tiny import tiny_vlm

QUICK = ["--num-virtual-tokens", "2", "--batch-size", "6", "--epochs", "2"]


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    random, found = np.random.default_rng(0), []
    for number in range(12):
        path = tmp_path / f"{number}.png"
        Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
        name = ["SA", "TCB", "GB"][number % 3]
        answer = "I can't help with that." if name == "SA" else "A cup."
        found.append(
            Sample(id=str(number), prompt="How?", images=(path,), answer=answer, set_name=name)
        )
    return found


@pytest.fixture
def data(samples: list[Sample], tmp_path: Path) -> Path:
    return save_samples(samples, tmp_path / "triad.jsonl")


def fit(data: Path, out: Path, *more: str) -> int:
    words = ["fit", "security-tensors", "--model", "tiny/llava", "--data", str(data)]
    return main([*words, "--out", str(out), *more])


def test_a_fit_saves_an_artifact_that_loads(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(data, tmp_path / "a", *QUICK) == 0
    method = SecurityTensors.load(tmp_path / "a", tiny_vlm("llava"))
    assert method.config.num_virtual_tokens == 2
    assert method.metadata.data_source == str(data)
    out = capsys.readouterr().out
    assert out.startswith("fitted in 4 steps: ")
    assert f"artifact: {tmp_path / 'a'}" in out


def test_settings_come_from_a_file_and_options_take_precedence(data: Path, tmp_path: Path) -> None:
    settings = {"num_virtual_tokens": 3, "epochs": 1, "learning_rate": 1, "position": "after_image"}
    (tmp_path / "c.json").write_text(json.dumps(settings))
    more = ["--config", str(tmp_path / "c.json"), "--num-virtual-tokens", "2", "--kl-top-k", "4"]
    assert fit(data, tmp_path / "a", *more, "--benign-loss", "kl") == 0
    config = SecurityTensors.load(tmp_path / "a", tiny_vlm("llava")).config
    assert (config.num_virtual_tokens, config.epochs, config.learning_rate) == (2, 1, 1)
    assert (config.position, config.benign_loss, config.kl_top_k) == ("after_image", "kl", 4)


def test_held_out_pictures_checkpoint_cache_and_tensorboard(data: Path, tmp_path: Path) -> None:
    more = ["--hold-out", "0.25", "--patience", "1", "--checkpoint", str(tmp_path / "state"),
            "--cache", str(tmp_path / "cache"), "--tensorboard", str(tmp_path / "events"),
            "--position", "after_image"]  # fmt: skip
    assert fit(data, tmp_path / "a", *QUICK, *more) == 0
    method = SecurityTensors.load(tmp_path / "a", tiny_vlm("llava"))
    assert "score" in method.metadata.details["losses"][0]
    assert method.metadata.details["samples"] == {"SA": 3, "TCB": 3, "GB": 3}
    assert (tmp_path / "state").is_file()
    assert list((tmp_path / "cache").glob("*.safetensors"))
    assert list((tmp_path / "events").glob("events.*"))


def test_the_authors_layout_is_read(samples: list[Sample], tmp_path: Path) -> None:
    records = [
        {
            "pic_path": sample.images[0].name,
            "input": sample.prompt,
            "output": "A cup.",
            "output_refuse": "I cannot help.",
            "type": f"{sample.set_name} set",
        }
        for sample in samples
    ]
    (tmp_path / "authors.json").write_text(json.dumps(records))
    assert fit(tmp_path / "authors.json", tmp_path / "a", *QUICK, "--pictures", str(tmp_path)) == 0


def test_bad_input_is_one_line_and_status_2(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.json").write_text('{"num_tokens": 2}')
    (tmp_path / "type.json").write_text('{"epochs": "2"}')
    (tmp_path / "list.json").write_text("[1]")
    cases = (
        (["--config", str(tmp_path / "bad.json")], "there is no setting 'num_tokens'"),
        (["--config", str(tmp_path / "type.json")], "epochs is '2', expected int"),
        (["--config", str(tmp_path / "list.json")], "is no JSON object"),
        (["--position", "end"], '"prefix" or "after_image"'),
        (["--hold-out", "0.5", "--validation", str(data)], "Leave one out"),
        (["--hold-out", "1.5"], "must be above 0 and below 1"),
    )
    for more, message in cases:
        assert fit(data, tmp_path / "a", *more) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error


def test_the_help_of_the_method_needs_no_torch_and_names_every_setting() -> None:
    code = (
        "import sys\nfrom safebridge.cli.main import main\n"
        "try:\n    main(['fit', 'security-tensors', '--help'])\nexcept SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    done = subprocess.run(  # noqa: S603 - our own code
        [sys.executable, "-c", code], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for flag in ("--max-change-pixels-255", "--is-gradient-checkpointed", "--order", "--cache"):
        assert flag in done.stdout
