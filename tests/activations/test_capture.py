"""Capture: the right tokens of the right places, in memory and on disk."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from safebridge.activations import capture, shared
from safebridge.activations.capture import READ_POSITIONS, capture_activations
from safebridge.activations.sites import PLACES
from safebridge.activations.store import capture_to_disk, open_store
from safebridge.data.sample import Sample, open_images
from safebridge.errors import ArtifactError, DataError, SettingError, ShapeError, UnknownNameError
from safebridge.methods.security_tensors.application import apply_tensors
from safebridge.models.load import VLM
from safebridge.models.tokens import encode
from safebridge.testing.tiny import TINY_FAMILIES

CLOSE = {"atol": 1e-4, "rtol": 1e-3}


def plain_state(vlm: VLM, sample: Sample, place: str, layer: int, position: str) -> Tensor:
    """An independent oracle: one sample, everything kept, pooled afterwards."""
    answers = None if position == "last_prompt_token" else [sample.answer or ""]
    encoded = encode(vlm, [sample.prompt], [open_images(sample)], answers, padding_side="right")
    seen: list[Tensor] = []
    block = vlm.layout.layer(vlm.model, layer)
    output = vlm.layout.in_layer(vlm.model, layer, "attention_output")
    mlp = vlm.layout.in_layer(vlm.model, layer, "mlp")

    def before(_module: Any, args: Any, kwargs: Any) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    def after(_module: Any, _args: Any, found: Any) -> None:
        seen.append(found[0] if isinstance(found, tuple) else found)

    handle = {
        "resid_in": lambda: block.register_forward_pre_hook(before, with_kwargs=True),
        "resid_out": lambda: block.register_forward_hook(after),
        "attn_out": lambda: output.register_forward_hook(after),
        "heads": lambda: output.register_forward_pre_hook(before, with_kwargs=True),
        "mlp_out": lambda: mlp.register_forward_hook(after),
    }[place]()
    with torch.no_grad():
        vlm.model(**encoded.inputs)
    handle.remove()
    hidden = seen[0][0]
    if answers is None:
        return hidden[-1]
    own = encoded.spans.answer[0].nonzero()[:, 0][:-1]  # without the end-of-turn token
    return hidden[own[-1]] if position == "last_response_token" else hidden[own].mean(dim=0)


@pytest.mark.parametrize("position", READ_POSITIONS)
@pytest.mark.parametrize("family", list(TINY_FAMILIES))
def test_padded_batches_hold_what_single_passes_hold(
    tiny: Callable[[str], VLM], samples: list[Sample], family: str, position: str
) -> None:
    vlm = tiny(family)
    found = capture_activations(vlm, samples, places=PLACES, read_position=position, batch_size=3)
    assert found.ids == tuple(sample.id for sample in samples)
    assert found.layers == tuple(range(vlm.layout.num_layers))
    for place in PLACES:
        for row in (0, 3):
            for layer in (0, vlm.layout.num_layers - 1):
                expected = plain_state(vlm, samples[row], place, layer, position)
                state = found.tensors[place][row, layer].flatten()
                torch.testing.assert_close(state, expected, **CLOSE)
    assert found.tensors["heads"].shape[2:] == (vlm.layout.num_heads, vlm.layout.head_dim)


@pytest.mark.parametrize("position", ["last_response_token", "mean_response"])
@pytest.mark.parametrize("family", list(TINY_FAMILIES))
def test_answers_of_one_prompt_hold_what_single_passes_hold(
    tiny: Callable[[str], VLM], samples: list[Sample], family: str, position: str
) -> None:
    vlm = tiny(family)
    answers = ["No.", "I will not do it.", "Yes, of course."]
    many = [
        replace(sample, id=f"{sample.id}-{number}", answer=answer)
        for number, answer in enumerate(answers)
        for sample in samples[:3]
    ]
    found = capture_activations(
        vlm, many, places=("heads", "resid_out"), read_position=position, batch_size=1
    )
    for row in (0, 4, 8):
        for place in ("heads", "resid_out"):
            for layer in (0, vlm.layout.num_layers - 1):
                expected = plain_state(vlm, many[row], place, layer, position)
                state = found.tensors[place][row, layer].flatten()
                torch.testing.assert_close(state, expected, **CLOSE)


def test_a_prompt_with_many_answers_is_run_once(
    tiny: Callable[[str], VLM], samples: list[Sample]
) -> None:
    vlm, rows = tiny("llava"), []
    many = [replace(samples[0], id=str(n), answer="No." + "!" * n) for n in range(6)]
    tower = vlm.layout.get(vlm.model, "vision_tower")
    handle = tower.register_forward_pre_hook(
        lambda _m, args, kwargs: rows.append(len(args[0] if args else kwargs["pixel_values"])),
        with_kwargs=True,
    )
    capture_activations(vlm, many, read_position="mean_response")
    handle.remove()
    assert sum(rows) == 2  # once for all, and once for the check against a whole pass


def test_a_shared_prompt_that_does_not_agree_is_not_believed(
    tiny: Callable[[str], VLM], samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = tiny("llava")
    many = [replace(samples[0], id=str(n), answer="No." + "!" * n) for n in range(4)]
    expected = capture_activations(vlm, many, read_position="mean_response")
    wrong = shared.run_shared

    def disturbed(*args: Any, **kwargs: Any) -> Any:
        found = wrong(*args, **kwargs)
        return None if found is None else {site: state + 1 for site, state in found.items()}

    monkeypatch.setattr(capture, "run_shared", disturbed)
    found = capture_activations(vlm, many, read_position="mean_response")
    torch.testing.assert_close(found.tensors["resid_out"], expected.tensors["resid_out"], **CLOSE)


def test_nothing_is_computed_after_the_last_wanted_place(
    tiny: Callable[[str], VLM], samples: list[Sample]
) -> None:
    vlm, calls = tiny("llava"), []
    handles = [
        module.register_forward_pre_hook(lambda *_: calls.append("late"))
        for module in (vlm.layout.layer(vlm.model, 2), vlm.layout.get(vlm.model, "lm_head"))
    ]
    capture_activations(vlm, samples, layers=[0, 1])
    for handle in handles:
        handle.remove()
    assert not calls


def test_a_text_prompt_skips_layers_that_attend_to_pictures(
    tiny: Callable[[str], VLM], samples: list[Sample]
) -> None:
    vlm = tiny("mllama")
    text = [Sample(id=s.id, prompt=s.prompt) for s in samples[:2]]
    assert capture_activations(vlm, text).layers == (0, 2, 3)
    with pytest.raises(ShapeError, match="Leave them out"):
        capture_activations(vlm, text, layers=[0, 1])


def test_a_defended_model_is_read_at_the_same_tokens(
    tiny: Callable[[str], VLM], samples: list[Sample]
) -> None:
    vlm = tiny("llava")
    tokens = torch.randn(3, vlm.layout.hidden_size, generator=torch.Generator().manual_seed(0))
    plain = capture_activations(vlm, samples, places=["resid_in"], layers=[0])
    with apply_tensors(vlm, tokens=tokens, pixels=None):
        first = capture_activations(vlm, samples, places=["resid_in"], layers=[0])
        deep = capture_activations(vlm, samples, layers=[2])
    # The embedding of the last prompt token is the same; deeper it has seen the tokens.
    torch.testing.assert_close(first.tensors["resid_in"], plain.tensors["resid_in"], **CLOSE)
    undefended = capture_activations(vlm, samples, layers=[2]).tensors["resid_out"]
    assert not torch.allclose(deep.tensors["resid_out"], undefended, atol=1e-2)


def test_progress_counts_the_samples(tiny: Callable[[str], VLM], samples: list[Sample]) -> None:
    steps: list[int] = []
    capture_activations(tiny("llava"), samples, batch_size=2, progress=steps.append)
    assert sum(steps) == len(samples)


def test_a_store_holds_what_memory_holds_and_goes_on_where_it_stopped(
    tiny: Callable[[str], VLM], samples: list[Sample], tmp_path: Path
) -> None:
    vlm = tiny("llava")
    options: dict[str, Any] = {
        "places": ["heads", "resid_out"],
        "read_position": "mean_response",
        "batch_size": 2,
    }
    expected = capture_activations(vlm, samples, **options)
    store = capture_to_disk(vlm, samples, tmp_path / "bank", shard_size=2, **options)
    files = sorted((tmp_path / "bank").glob("shard-*"))
    assert len(files) == 3
    for place in options["places"]:
        for layer in store.layers:
            torch.testing.assert_close(
                store.read(place, layer), expected.tensors[place][:, layer], **CLOSE
            )
    kept = files[0].stat().st_mtime_ns
    files[1].unlink()
    with pytest.raises(ArtifactError, match="Run it again"):
        open_store(tmp_path / "bank")
    again = capture_to_disk(vlm, samples, tmp_path / "bank", shard_size=2, **options)
    assert files[0].stat().st_mtime_ns == kept
    assert torch.equal(again.read("heads", 1), store.read("heads", 1))
    assert again.ids == expected.ids
    assert not list((tmp_path / "bank").glob(".*"))


def test_a_folder_of_another_capture_is_refused(
    tiny: Callable[[str], VLM], samples: list[Sample], tmp_path: Path
) -> None:
    capture_to_disk(tiny("llava"), samples, tmp_path, layers=[0])
    with pytest.raises(ArtifactError, match="differs in layers"):
        capture_to_disk(tiny("llava"), samples, tmp_path, layers=[1])
    with pytest.raises(ArtifactError, match="samples_sha256"):
        capture_to_disk(tiny("llava"), samples[1:], tmp_path, layers=[0])
    (tmp_path / "shard-000000.safetensors").write_bytes(b"cut off")
    with pytest.raises(ArtifactError, match="Run the capture again"):
        open_store(tmp_path).read("resid_out", 0)


@pytest.mark.slow
def test_processes_share_the_files(tmp_path: Path, pictures: list[Path]) -> None:
    script = tmp_path / "capture.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from safebridge.activations.store import capture_to_disk\n"
        "from safebridge.data.sample import Sample\n"
        "from safebridge.testing.tiny import tiny_vlm\n"
        f"picture = Path({str(pictures[0])!r})\n"
        "samples = [Sample(str(i), 'How?' + '!' * i, (picture,)) for i in range(6)]\n"
        "capture_to_disk(tiny_vlm('llava'), samples, sys.argv[1], shard_size=1)\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    subprocess.run(  # noqa: S603 - our own script
        [*command, str(script), str(tmp_path / "two")],
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    samples = [Sample(str(i), "How?" + "!" * i, (pictures[0],)) for i in range(6)]
    from safebridge.testing.tiny import tiny_vlm  # noqa: PLC0415 - after the launch

    alone = capture_to_disk(tiny_vlm("llava"), samples, tmp_path / "one", shard_size=1)
    both = open_store(tmp_path / "two")
    torch.testing.assert_close(both.read("resid_out", 2), alone.read("resid_out", 2), **CLOSE)


@pytest.mark.parametrize(
    ("options", "error", "advice"),
    [
        ({"places": ["nose"]}, UnknownNameError, "Known: attn_out"),
        ({"places": []}, DataError, "Name some of"),
        ({"read_position": "first"}, SettingError, "Choose last_prompt_token"),
        ({"batch_size": 0}, SettingError, "at least 1"),
        ({"layers": [9]}, ShapeError, "Name one from 0"),
    ],
)
def test_errors_say_what_to_do(
    tiny: Callable[[str], VLM],
    samples: list[Sample],
    options: dict[str, Any],
    error: type[Exception],
    advice: str,
) -> None:
    with pytest.raises(error, match=advice):
        capture_activations(tiny("llava"), samples, **options)


def test_missing_samples_and_answers_are_named(tiny: Callable[[str], VLM]) -> None:
    with pytest.raises(DataError, match="Pass at least one"):
        capture_activations(tiny("llava"), [])
    with pytest.raises(DataError, match="sample 'x' has no answer"):
        capture_activations(tiny("llava"), [Sample("x", "How?")], read_position="mean_response")
