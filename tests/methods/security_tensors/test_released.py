import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PromptTuningConfig, TaskType, get_peft_model
from PIL import Image
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from safebridge.errors import ArtifactError, SettingError, ShapeError
from safebridge.methods.security_tensors.method import SecurityTensors
from safebridge.methods.security_tensors.released import load_released
from safebridge.models.load import VLM
from safebridge.models.tokens import encode


def as_peft(vlm: VLM, n: int) -> torch.nn.Module:
    """Return PEFT's own prompt tuning on a copy of a model's decoder."""
    decoder = LlamaForCausalLM(vlm.model.config.text_config)
    decoder.model.load_state_dict(vlm.model.model.language_model.state_dict())
    decoder.lm_head.load_state_dict(vlm.model.lm_head.state_dict())
    torch.manual_seed(3)
    config = PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM, num_virtual_tokens=n, num_transformer_submodules=1
    )
    return get_peft_model(decoder, config).eval()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT reads what transformers renamed
def test_an_imported_adapter_gives_the_logits_of_peft(
    tiny: Callable[[str], VLM], tmp_path: Path
) -> None:
    vlm = tiny("llava")
    with torch.random.fork_rng():
        peft = as_peft(vlm, 5)
    peft.save_pretrained(tmp_path / "a")
    method = load_released(vlm, prompt_tuning=tmp_path / "a")
    inputs = encode(vlm, ["How are you?"], [[]]).inputs
    with torch.no_grad():
        expected = peft(**inputs).logits[:, 5:]
        with method.apply(vlm):
            found = vlm.model(**inputs).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    again = SecurityTensors.load(method.save(tmp_path / "b"), vlm)
    assert torch.equal(again.tensors["tokens"], method.tensors["tokens"])


@pytest.mark.parametrize("is_old", [True, False])
def test_adapters_are_read_from_either_file(
    tiny: Callable[[str], VLM], tmp_path: Path, *, is_old: bool
) -> None:
    tokens = torch.randn(4, 32)
    write_adapter(tmp_path, tokens, is_old=is_old)
    method = load_released(tiny("llava"), prompt_tuning=tmp_path)
    assert torch.equal(method.tensors["tokens"], tokens)
    assert method.config.num_virtual_tokens == 4
    assert method.config.modality == "textual"


def write_adapter(folder: Path, tokens: torch.Tensor, *, is_old: bool = False) -> None:
    record = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4, "token_dim": 32}
    (folder / "adapter_config.json").write_text(json.dumps(record))
    values = {"prompt_embeddings": tokens}
    if is_old:
        torch.save(values, folder / "adapter_model.bin")
    else:
        save_file(values, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((1, 3, 32, 32), (3, 32, 32)), ((3, 32, 32), (3, 32, 32)), ((1, 1, 4, 3, 8, 8), (4, 3, 8, 8))],
)
def test_noise_loses_its_axes_of_one(
    tiny: Callable[[str], VLM],
    tmp_path: Path,
    shape: tuple[int, ...],
    expected: tuple[int, ...],
) -> None:
    noise = torch.nn.Parameter(torch.randn(shape))
    torch.save(noise, tmp_path / "noise.pt")
    method = load_released(tiny("llava"), noise=tmp_path / "noise.pt")
    assert torch.equal(method.tensors["pixels"], noise.detach().view(expected))
    assert method.config.modality == "visual"


def test_a_tensor_for_each_tile_applies_to_mllama(
    tiny: Callable[[str], VLM], tmp_path: Path
) -> None:
    vlm = tiny("mllama")
    inputs = encode(vlm, ["a"], [[Image.new("RGB", (32, 64), "red")]]).inputs
    torch.save(torch.ones(inputs["pixel_values"].shape[2:]), tmp_path / "n.pt")
    method = load_released(vlm, noise=tmp_path / "n.pt")
    assert method.tensors["pixels"].ndim == 4
    with torch.no_grad():
        before = vlm.model(**inputs).logits
        with method.apply(vlm):
            assert not torch.allclose(vlm.model(**inputs).logits, before, atol=1e-3)


class Stranger:
    """Something that a file of tensors has no business to hold."""


def test_files_that_would_run_code_are_refused(tiny: Callable[[str], VLM], tmp_path: Path) -> None:
    torch.save(Stranger(), tmp_path / "noise.pt")
    with pytest.raises(ArtifactError, match="would run code"):
        load_released(tiny("llava"), noise=tmp_path / "noise.pt")


def test_other_files_say_what_was_expected(tiny: Callable[[str], VLM], tmp_path: Path) -> None:
    vlm = tiny("llava")
    with pytest.raises(SettingError, match="prompt_tuning=FOLDER"):
        load_released(vlm)
    with pytest.raises(ArtifactError, match="Give the folder that PEFT wrote"):
        load_released(vlm, prompt_tuning=tmp_path)
    write_adapter(tmp_path, torch.randn(3, 32))
    with pytest.raises(ArtifactError, match=r"\[3, 32\], but adapter_config.json says \[4, 32\]"):
        load_released(vlm, prompt_tuning=tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ArtifactError, match="'LORA', expected 'PROMPT_TUNING'"):
        load_released(vlm, prompt_tuning=tmp_path)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ArtifactError, match="holds list, expected one tensor"):
        load_released(vlm, noise=tmp_path / "list.pt")
    torch.save(torch.ones(3), tmp_path / "flat.pt")
    with pytest.raises(ArtifactError, match=r"shape \[3\], expected"):
        load_released(vlm, noise=tmp_path / "flat.pt")


def test_tokens_of_another_width_are_refused_when_they_are_applied(
    tiny: Callable[[str], VLM], tmp_path: Path
) -> None:
    write_adapter(tmp_path, torch.randn(4, 32))
    vlm = tiny("paligemma")  # 16 wide
    with (
        pytest.raises(ShapeError, match="32 features but tiny/paligemma has 16"),
        load_released(vlm, prompt_tuning=tmp_path).apply(vlm),
    ):
        pass
