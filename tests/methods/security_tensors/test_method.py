from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from safebridge.artifacts.store import ArtifactMetadata, save_artifact
from safebridge.data.sample import Sample, open_images
from safebridge.errors import (
    DataError,
    ModelMismatchError,
    SafebridgeError,
    SettingError,
    ShapeError,
)
from safebridge.methods.protocol import Method
from safebridge.methods.security_tensors.config import SecurityTensorsConfig
from safebridge.methods.security_tensors.engines import ModelEngine
from safebridge.methods.security_tensors.method import SecurityTensors
from safebridge.methods.security_tensors.modules import SecurityTensorModule
from safebridge.methods.security_tensors.pixels import add_pixels
from safebridge.models.load import VLM
from safebridge.models.tokens import encode
from safebridge.registry import METHODS, resolve
from safebridge.training.loop import TrainingEvent

QUICK: dict[str, Any] = {"num_virtual_tokens": 2, "batch_size": 3, "max_steps": 1}


@pytest.fixture(scope="module")
def fitted(tiny: Callable[[str], VLM], triad: list[Sample]) -> SecurityTensors:
    return SecurityTensors.fit(tiny("llava"), triad, SecurityTensorsConfig(**QUICK))


def test_the_registry_knows_the_method(fitted: SecurityTensors) -> None:
    assert resolve("method", "security-tensors", METHODS) is SecurityTensors
    assert isinstance(fitted, Method)


def test_unknown_sets_are_refused(tiny: Callable[[str], VLM], triad: list[Sample]) -> None:
    wrong = [*triad, replace(triad[0], id="x9", set_name="Harmful")]
    with pytest.raises(DataError, match="'x9' is of set 'Harmful'; known are SA, TCB, GB"):
        SecurityTensors.fit(tiny("llava"), wrong)


def test_samples_without_a_target_are_refused(
    tiny: Callable[[str], VLM], triad: list[Sample]
) -> None:
    with pytest.raises(DataError, match="build_triad does both"):
        SecurityTensors.fit(tiny("llava"), [replace(triad[0], answer=" ")])
    with pytest.raises(DataError, match="Pass SA, TCB and GB"):
        SecurityTensors.fit(tiny("llava"), [])


def test_the_same_seed_gives_the_same_tensor(
    tiny: Callable[[str], VLM], triad: list[Sample]
) -> None:
    config = SecurityTensorsConfig(num_virtual_tokens=2, batch_size=2, epochs=2)
    first = SecurityTensors.fit(tiny("llava"), triad, config).tensors["tokens"]
    assert torch.equal(SecurityTensors.fit(tiny("llava"), triad, config).tensors["tokens"], first)
    other = SecurityTensors.fit(tiny("llava"), triad, replace(config, seed=1)).tensors["tokens"]
    assert not torch.equal(other, first)


def test_a_set_of_weight_zero_teaches_nothing(
    tiny: Callable[[str], VLM], triad: list[Sample]
) -> None:
    only_sa = [sample for sample in triad if sample.set_name == "SA"]
    options = QUICK | {"weight_tcb": 0.0, "weight_gb": 0.0, "batch_size": 6, "weight_decay": 0.0}
    options |= {"max_grad_norm": 0.0}
    mixed = SecurityTensors.fit(tiny("llava"), triad, SecurityTensorsConfig(**options))
    alone = SecurityTensors.fit(tiny("llava"), only_sa, SecurityTensorsConfig(**options))
    torch.testing.assert_close(mixed.tensors["tokens"], alone.tensors["tokens"])


def test_the_start_is_as_the_config_says(tiny: Callable[[str], VLM], triad: list[Sample]) -> None:
    vlm = tiny("llava")
    options = {"num_virtual_tokens": 200, "max_steps": 1, "learning_rate": 1e-12}
    random = SecurityTensors.fit(vlm, triad, SecurityTensorsConfig(init="random", **options))
    assert float(random.tensors["tokens"].std()) == pytest.approx(1.0, abs=0.05)
    drawn = SecurityTensors.fit(vlm, triad, SecurityTensorsConfig(**options)).tensors["tokens"]
    table = vlm.layout.get(vlm.model, "embed_tokens").weight.detach()
    assert float(torch.cdist(drawn, table).min(dim=1).values.max()) < 1e-3
    config = SecurityTensorsConfig(init="text", init_text="Be careful.", **options)
    words = vlm.tokenizer("Be careful.", add_special_tokens=False)["input_ids"]
    said = SecurityTensors.fit(vlm, triad, config).tensors["tokens"]
    expected = table[torch.tensor(words)].repeat(200 // len(words) + 1, 1)[:200]
    torch.testing.assert_close(said, expected)


def test_progress_and_metadata_tell_the_loss_of_each_set(
    tiny: Callable[[str], VLM], triad: list[Sample]
) -> None:
    events: list[TrainingEvent] = []
    config = SecurityTensorsConfig(num_virtual_tokens=2, epochs=2, batch_size=3)
    method = SecurityTensors.fit(
        tiny("llava"), triad, config, progress=events.append, data_source="a test"
    )
    assert set(events[-1].losses) == {"SA", "TCB", "GB"}
    metadata = method.metadata
    assert metadata.base_model == "tiny/llava"
    assert metadata.fingerprint == tiny("llava").fingerprint
    assert metadata.data_source == "a test"
    assert metadata.details["samples"] == {"SA": 2, "TCB": 2, "GB": 2}
    assert metadata.details["path"] == "decoder"
    assert len(metadata.details["losses"]) == 2


def test_a_validation_on_samples_keeps_the_epoch_of_least_loss(
    tiny: Callable[[str], VLM], triad: list[Sample]
) -> None:
    vlm = tiny("llava")
    config = SecurityTensorsConfig(
        num_virtual_tokens=2, epochs=4, batch_size=3, learning_rate=30.0, schedule="constant"
    )
    method = SecurityTensors.fit(vlm, triad, config, validation=triad)
    scores = [epoch["score"] for epoch in method.metadata.details["losses"]]
    module = SecurityTensorModule(method.tensors["tokens"], None)
    with torch.no_grad():
        losses = ModelEngine(vlm, triad, config, module).losses(range(len(triad)))
    # Two samples of each set, so the mean over sets is the mean over samples.
    assert max(scores) == pytest.approx(-float(losses.mean()), rel=1e-4)
    assert len(set(scores)) == 4


def test_a_validation_of_ones_own_can_apply_the_tensor(
    tiny: Callable[[str], VLM], triad: list[Sample]
) -> None:
    vlm, seen = tiny("llava"), []
    inputs = encode(vlm, ["Hi"], [open_images(triad[0])]).inputs

    def score(method: SecurityTensors) -> float:
        with method.apply(vlm), torch.no_grad():
            seen.append(vlm.model(**inputs).logits)
        return float(len(seen))

    config = SecurityTensorsConfig(num_virtual_tokens=2, epochs=2)
    SecurityTensors.fit(vlm, triad, config, validation=score)
    assert len(seen) == 2
    assert not torch.equal(seen[0], seen[1])


def test_a_fit_that_was_cut_off_goes_on(
    tiny: Callable[[str], VLM], triad: list[Sample], tmp_path: Path
) -> None:
    vlm, config = tiny("llava"), SecurityTensorsConfig(num_virtual_tokens=2, epochs=3, batch_size=2)
    expected = SecurityTensors.fit(vlm, triad, config)

    def stop(event: TrainingEvent) -> None:
        if event.step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        SecurityTensors.fit(vlm, triad, config, checkpoint=tmp_path / "c", progress=stop)
    found = SecurityTensors.fit(vlm, triad, config, checkpoint=tmp_path / "c")
    assert torch.equal(found.tensors["tokens"], expected.tensors["tokens"])
    assert found.metadata == expected.metadata


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_a_bound_in_pixels_holds_from_the_start_to_the_end(
    tiny: Callable[[str], VLM], triad: list[Sample], family: str
) -> None:
    vlm = tiny(family)
    config = SecurityTensorsConfig(
        modality="visual", max_change_pixels_255=6.0, visual_learning_rate=0.1, max_steps=3
    )
    pixels = SecurityTensors.fit(vlm, triad, config).tensors["pixels"]
    deviation = torch.tensor(vlm.processor.image_processor.image_std)[:, None, None]
    change = (pixels * deviation * 255).abs()
    assert float(change.max()) == pytest.approx(6.0, rel=1e-4)  # it is reached and not passed
    free = replace(config, max_change_pixels_255=0.0)
    wide = SecurityTensors.fit(vlm, triad, free).tensors["pixels"]
    assert float((wide * deviation * 255).abs().max()) > 20


@pytest.mark.parametrize(
    ("order", "kept"), [("textual_first", "tokens"), ("visual_first", "pixels")]
)
def test_the_part_that_is_fitted_first_stays_as_it_is(
    tiny: Callable[[str], VLM], triad: list[Sample], order: str, kept: str
) -> None:
    vlm = tiny("llava")
    config = SecurityTensorsConfig(
        modality="both", order=order, num_virtual_tokens=2, epochs=2, batch_size=3
    )
    modality = {"tokens": "textual", "pixels": "visual"}[kept]
    alone = SecurityTensors.fit(vlm, triad, replace(config, modality=modality))
    both = SecurityTensors.fit(vlm, triad, config)
    joint = SecurityTensors.fit(vlm, triad, replace(config, order="joint"))
    assert set(both.tensors) == {"tokens", "pixels"}
    if kept == "tokens":  # the pixels are drawn after the tokens, so alone they start elsewhere
        assert torch.equal(both.tensors[kept], alone.tensors[kept])
    other = "pixels" if kept == "tokens" else "tokens"
    assert not torch.allclose(both.tensors[other], joint.tensors[other], atol=1e-4)
    assert not torch.allclose(both.tensors[kept], joint.tensors[kept], atol=1e-4)
    assert both.metadata.details["steps"] == 2 * joint.metadata.details["steps"]
    assert len(both.metadata.details["losses"]) == 4


def test_a_second_stage_that_was_cut_off_goes_on(
    tiny: Callable[[str], VLM], triad: list[Sample], tmp_path: Path
) -> None:
    vlm = tiny("llava")
    config = SecurityTensorsConfig(
        modality="both", order="textual_first", num_virtual_tokens=2, epochs=2, batch_size=3
    )
    expected, seen = SecurityTensors.fit(vlm, triad, config), []

    def stop(event: TrainingEvent) -> None:
        seen.append(event)
        if len(seen) == 2 * (2 + 1) + 4:  # the second stage's second epoch
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        SecurityTensors.fit(vlm, triad, config, checkpoint=tmp_path / "c", progress=stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "c.2"]
    found = SecurityTensors.fit(vlm, triad, config, checkpoint=tmp_path / "c")
    for name, value in expected.tensors.items():
        assert torch.equal(found.tensors[name], value)
    assert found.metadata == expected.metadata


def test_a_cache_folder_changes_nothing_and_is_found_again(
    tiny: Callable[[str], VLM], triad: list[Sample], tmp_path: Path
) -> None:
    vlm = tiny("llava")
    config = SecurityTensorsConfig(
        num_virtual_tokens=2, epochs=2, batch_size=3, position="after_image", benign_loss="kl"
    )
    expected = SecurityTensors.fit(vlm, triad, config).tensors["tokens"]
    written: list[dict[Path, int]] = []
    for _ in range(2):
        found = SecurityTensors.fit(vlm, triad, config, cache=tmp_path).tensors["tokens"]
        torch.testing.assert_close(found, expected)
        written.append({path: path.stat().st_mtime_ns for path in tmp_path.iterdir()})
    assert written[0] == written[1]
    # The keys and values of four pictures, and the answers of four benign samples.
    assert len(written[0]) == 4 + 4


def test_an_artifact_of_another_model_names_both(
    tiny: Callable[[str], VLM], fitted: SecurityTensors, tmp_path: Path
) -> None:
    folder, other = fitted.save(tmp_path / "a"), tiny("llava_next")
    with pytest.raises(ModelMismatchError, match=r"tiny/llava \(.*tiny/llava_next \(.*on purpose"):
        SecurityTensors.load(folder, other)
    moved = SecurityTensors.load(folder, other, allow_other_model=True)
    assert torch.equal(moved.tensors["tokens"], fitted.tensors["tokens"])


def test_another_width_is_refused_in_any_case(
    tiny: Callable[[str], VLM], fitted: SecurityTensors, tmp_path: Path
) -> None:
    narrow = SecurityTensors(fitted.config, {"tokens": torch.zeros(2, 7)}, fitted.metadata)
    message = "7 features but tiny/llava has 32.*fitted on tiny/llava.*fit again"
    with pytest.raises(ShapeError, match=message), narrow.apply(tiny("llava")):
        pass
    with pytest.raises(ShapeError, match=message):
        SecurityTensors.load(narrow.save(tmp_path / "a"), tiny("llava"), allow_other_model=True)


def test_an_artifact_without_its_tensor_is_refused(
    tiny: Callable[[str], VLM], fitted: SecurityTensors, tmp_path: Path
) -> None:
    save_artifact(
        tmp_path / "a",
        kind="security-tensors",
        config=fitted.config.to_dict(),
        tensors={"pixels": torch.zeros(3, 2, 2)},
        metadata=ArtifactMetadata("m", None, "f", "d", 0),
    )
    with pytest.raises(ModelMismatchError, match=r"holds \['pixels'\].*needs \['tokens'\]"):
        SecurityTensors.load(tmp_path / "a", tiny("llava"))


def test_two_tensors_do_not_stack(tiny: Callable[[str], VLM], fitted: SecurityTensors) -> None:
    vlm = tiny("llava")
    with (
        fitted.apply(vlm),
        pytest.raises(SafebridgeError, match=r'already applied.*modality="both"'),
        fitted.apply(vlm),
    ):
        pass
    with fitted.apply(vlm):  # and the refusal left nothing behind
        pass


@pytest.mark.parametrize("strength", [-0.5, float("nan"), float("inf")])
def test_strengths_that_mean_nothing_are_refused(
    tiny: Callable[[str], VLM], fitted: SecurityTensors, strength: float
) -> None:
    with (
        pytest.raises(SettingError, match="must be 0"),
        fitted.apply(tiny("llava"), strength=strength),
    ):
        pass


def test_embeddings_in_place_of_ids_are_refused(
    tiny: Callable[[str], VLM], fitted: SecurityTensors
) -> None:
    vlm = tiny("llava")
    with fitted.apply(vlm), pytest.raises(SettingError, match="needs input_ids"):
        vlm.model(inputs_embeds=torch.zeros(1, 3, 32))


def test_pictures_of_another_size_are_refused(
    tiny: Callable[[str], VLM], fitted: SecurityTensors, triad: list[Sample]
) -> None:
    vlm = tiny("llava")
    config = replace(fitted.config, modality="visual")
    method = SecurityTensors(config, {"pixels": torch.zeros(3, 8, 8)}, fitted.metadata)
    inputs = encode(vlm, ["Hi"], [open_images(triad[0])]).inputs
    with pytest.raises(ShapeError, match=r"\[3, 8, 8\].*processor it was fitted with"):  # noqa: SIM117
        with method.apply(vlm):
            vlm.model(**inputs)


def test_a_visual_tensor_needs_a_sample_with_a_picture(tiny: Callable[[str], VLM]) -> None:
    sample = Sample(id="1", prompt="Hi", answer="No.", set_name="SA")
    with pytest.raises(SettingError, match="needs pictures"):
        SecurityTensors.fit(tiny("llava"), [sample], SecurityTensorsConfig(modality="visual"))


def test_padding_pictures_stay_zero() -> None:
    pictures = torch.zeros(1, 2, 3, 4, 4)
    pictures[:, 0] = 1.0
    found = add_pixels(pictures, torch.full((3, 4, 4), 0.5), strength=2.0)
    assert torch.equal(found[:, 0], torch.full((1, 3, 4, 4), 2.0))
    assert not found[:, 1].any()


def test_the_caller_never_sees_the_virtual_tokens(
    tiny: Callable[[str], VLM], fitted: SecurityTensors, triad: list[Sample]
) -> None:
    vlm = tiny("llava")
    encoded = encode(vlm, ["Hi", "Hello"], [open_images(s) for s in triad[:2]], ["a", "b"])
    inputs, labels = encoded.inputs, encoded.labels
    seq = inputs["input_ids"].shape[1]
    with fitted.apply(vlm), torch.no_grad():
        full = vlm.model(**inputs, labels=labels, output_hidden_states=True)
        last = vlm.model(**inputs, logits_to_keep=2)
        picked = vlm.model(**inputs, logits_to_keep=torch.tensor([1, seq - 1]))
        as_tuple = vlm.model(**inputs, return_dict=False)
        positional = vlm.model(
            inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"]
        )
        limited = vlm.model.generate(**inputs, max_length=seq + 2, do_sample=False)
    assert {hidden.shape[1] for hidden in full.hidden_states} == {seq}
    assert full.logits.shape[1] == seq
    assert torch.equal(last.logits, full.logits[:, -2:])
    assert torch.equal(picked.logits, full.logits[:, [1, seq - 1]])
    assert torch.equal(as_tuple[0], full.logits)
    assert torch.equal(positional.logits, full.logits)
    assert limited.shape[1] <= seq + 2
    assert torch.isfinite(full.loss)


def test_an_apply_around_several_calls_keeps_them_apart(
    tiny: Callable[[str], VLM], fitted: SecurityTensors, triad: list[Sample]
) -> None:
    vlm = tiny("llava")
    inputs = [encode(vlm, [p], [open_images(triad[0])]).inputs for p in ("Hi", "Something longer")]
    with fitted.apply(vlm), torch.no_grad():
        first = [vlm.model(**item).logits for item in inputs]
        vlm.model.generate(**inputs[0], max_new_tokens=2, do_sample=False)
        again = [vlm.model(**item).logits for item in inputs]
    for before, after in zip(first, again, strict=True):
        assert torch.equal(before, after)
