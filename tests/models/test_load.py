"""Loading: every family from a folder, built-in names, fingerprints, and errors."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from safebridge.errors import LayoutError, ModelLoadError, UnknownNameError
from safebridge.models.layout import VLMLayout
from safebridge.models.load import VLM, load_vlm, measure_fingerprint
from safebridge.testing.tiny import TINY_FAMILIES, tiny_vlm


def save(vlm: VLM, folder: Path) -> Path:
    vlm.model.save_pretrained(folder)
    vlm.processor.save_pretrained(folder)
    return folder


@pytest.fixture
def llava_folder(tmp_path: Path) -> Path:
    return save(tiny_vlm("llava"), tmp_path / "llava")


@pytest.mark.parametrize("family", sorted(TINY_FAMILIES))
def test_saved_model_loads_to_the_same(family: str, tmp_path: Path, make_picture: object) -> None:
    from safebridge.models.tokens import encode  # noqa: PLC0415 - read beside its use

    original = tiny_vlm(family)
    loaded = load_vlm(save(original, tmp_path))
    assert loaded.layout == original.layout
    assert loaded.fingerprint == original.fingerprint
    assert type(loaded.processor).__name__ == type(original.processor).__name__
    assert type(loaded.processor.image_processor).__name__.endswith("Pil")
    assert not loaded.model.training
    batches = [encode(vlm, ["Hi"], [[make_picture()]], ["Ho."]) for vlm in (original, loaded)]
    for name, value in batches[0].inputs.items():
        assert torch.equal(batches[1].inputs[name], value)
    with torch.no_grad():
        one, two = (
            vlm.model(**batch.inputs).logits
            for vlm, batch in zip((original, loaded), batches, strict=True)
        )
    assert torch.equal(one, two)


def test_tiny_models_load_by_name() -> None:
    vlm = load_vlm("tiny/qwen2_vl")
    assert (vlm.name, vlm.layout.family) == ("tiny/qwen2_vl", "qwen2_vl")
    assert vlm.fingerprint == tiny_vlm("qwen2_vl").fingerprint
    assert str(vlm.device) == "cpu"


def test_unknown_tiny_family_is_told_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match=r"no tiny family 'lava'. Did you mean 'llava'"):
        load_vlm("tiny/lava")


def test_dtype_casts_weights_and_leaves_rotary_frequencies(llava_folder: Path) -> None:
    full = load_vlm(llava_folder)
    for half in (
        load_vlm(llava_folder, dtype="bfloat16"),
        load_vlm("tiny/llava", dtype=torch.bfloat16),
    ):
        assert half.dtype == torch.bfloat16
        assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
        rotary = [vlm.model.model.language_model.rotary_emb.inv_freq for vlm in (full, half)]
        assert torch.equal(rotary[0], rotary[1])


def test_unknown_dtype_is_told_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match=r"no dtype 'bfloat'. Did you mean 'bfloat16'"):
        load_vlm("tiny/llava", dtype="bfloat")


def test_layout_by_hand_is_kept_and_completed(llava_folder: Path) -> None:
    given = VLMLayout(projector="model.multi_modal_projector.linear_2")
    for name in (llava_folder, "tiny/llava"):
        layout = load_vlm(name, layout=given).layout
        assert layout.projector == "model.multi_modal_projector.linear_2"
        assert layout.decoder_layers == "model.language_model.layers"


def test_wrong_layout_by_hand_is_named(llava_folder: Path) -> None:
    with pytest.raises(LayoutError, match=r"no projector at 'model.bridge'"):
        load_vlm(llava_folder, layout=VLMLayout(projector="model.bridge"))


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "~/nowhere", "a/b/c"])
def test_missing_folder_is_told_what_to_pass(name: str) -> None:
    message = r"no model folder at .*it does not exist. Pass the folder that save_pretrained wrote"
    with pytest.raises(ModelLoadError, match=message):
        load_vlm(name)


def test_file_in_place_of_a_folder_is_told(llava_folder: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"it is a file. Pass the folder"):
        load_vlm(llava_folder / "config.json")


def test_hub_name_that_is_not_cached_is_told_offline() -> None:
    assert constants.HF_HUB_OFFLINE
    message = r"could not load the config of 'llava-hf/no-such-model'.*HF_HUB_OFFLINE=1.*or pass a"
    with pytest.raises(ModelLoadError, match=message):
        load_vlm("llava-hf/no-such-model")


def test_folder_without_a_config_is_told_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(
        ModelLoadError, match=r"the config of .*Expected a folder as save_pretrained"
    ):
        load_vlm(tmp_path)


def test_broken_config_is_told(llava_folder: Path) -> None:
    (llava_folder / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match=r"could not load the config"):
        load_vlm(llava_folder)


def test_truncated_weights_are_told(llava_folder: Path) -> None:
    weights = llava_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(ModelLoadError, match=r"could not load the weights.*Expected a folder"):
        load_vlm(llava_folder)


def test_checkpoint_that_lacks_weights_is_an_error(llava_folder: Path) -> None:
    weights = llava_folder / "model.safetensors"
    tensors = load_file(weights)
    name = next(key for key in tensors if "projector" in key)
    del tensors[name]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"lacks 1 weights.*projector.*They would be random"):
        load_vlm(llava_folder)


def test_folder_without_a_processor_is_told(llava_folder: Path) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (llava_folder / file).unlink()
    with pytest.raises(ModelLoadError, match=r"could not load the processor of"):
        load_vlm(llava_folder)


def test_text_model_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    config = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=16)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(
        LayoutError, match=r"no vision-language model: its model_type 'gpt2'.*llava"
    ):
        load_vlm(tmp_path)


def test_family_that_is_not_known_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    config = {"model_type": "vipllava", "text_config": {"num_hidden_layers": 1}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LayoutError, match=r"VipLlava.* is of no family.*pass that as layout="):
        load_vlm(tmp_path)


def test_fingerprint_tells_one_changed_value_of_a_small_tensor() -> None:
    vlm = tiny_vlm("llava")
    before = vlm.fingerprint
    with torch.no_grad():
        vlm.model.model.multi_modal_projector.linear_1.bias[3] += 1e-3
    assert measure_fingerprint(vlm.model) != before
    assert vlm.fingerprint == before  # taken at first use


def test_fingerprint_depends_on_names_shapes_and_types() -> None:
    prints = {
        measure_fingerprint(module)
        for module in (
            nn.Linear(2, 3, device="meta"),
            nn.Linear(3, 2, device="meta"),
            nn.Linear(2, 3, device="meta", dtype=torch.bfloat16),
            nn.ModuleDict({"other": nn.Linear(2, 3, device="meta")}),
        )
    }
    assert len(prints) == 4
    assert all(len(text) == 64 for text in prints)


def test_fingerprint_of_a_large_model_takes_under_a_second() -> None:
    layers = nn.ModuleList(nn.Linear(1, 1) for _ in range(140))
    for layer in layers:  # as large as the embedded model; empty, because drawing takes longer
        layer.weight = nn.Parameter(torch.zeros(1000, 1000))
    start = time.process_time()
    measure_fingerprint(layers)
    assert time.process_time() - start < 1


def test_folder_can_be_moved(llava_folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.move(llava_folder, moved)
    assert load_vlm(str(moved)).name == str(moved)


def test_the_head_reads_the_positions_asked_for_in_one_piece() -> None:
    vlm = tiny_vlm("llava")
    head = vlm.layout.get(vlm.model, "lm_head")
    seen = []
    head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].is_contiguous()))
    hooks = len(head._forward_pre_hooks)
    again = VLM(vlm.model, vlm.processor, vlm.layout, "again")
    tokens = torch.ones(2, 3, dtype=torch.long)
    again.model(input_ids=tokens, logits_to_keep=1)
    assert seen == [True]
    assert len(head._forward_pre_hooks) == hooks
