"""What the method keeps on every family whose pictures become tokens."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from safebridge.data.sample import Sample, open_images
from safebridge.errors import (
    ArtifactError,
    ModelMismatchError,
    SafebridgeError,
    SettingError,
    ShapeError,
)
from safebridge.methods.protocol import Method
from safebridge.methods.text_guided_alignment.config import TextGuidedAlignmentConfig
from safebridge.methods.text_guided_alignment.method import TextGuidedAlignment
from safebridge.models.load import VLM
from safebridge.models.tokens import encode
from safebridge.testing.tiny import TINY_FAMILIES, tiny_vlm
from safebridge.training.loop import TrainingEvent

UNSUPPORTED = {"mllama", "instructblip"}
FAMILIES = [name for name in TINY_FAMILIES if name not in UNSUPPORTED]
CASES = [(family, "projector") for family in FAMILIES] + [
    ("llava", "projector+lora"),
    ("llava", "full"),
    ("qwen2_vl", "projector+lora"),
    ("smolvlm", "full"),
]


def config_of(family: str, trainable: str, **options: Any) -> TextGuidedAlignmentConfig:
    given = {
        "epochs": 8,
        "batch_size": 3,
        "learning_rate": 5e-3,
        "language_learning_rate": 3e-3,
        # Without a chat template there is no place for a text before the picture.
        "retrieved": "text_pass" if family == "paligemma" else "prefix",
    }
    return TextGuidedAlignmentConfig(trainable=trainable, **{**given, **options})


Fitted = tuple[VLM, TextGuidedAlignment, list[dict[str, float]]]


@pytest.fixture(scope="module")
def fitted(tiny: Callable[[str], VLM], guided: list[Sample]) -> Callable[[str, str], Fitted]:
    known: dict[tuple[str, str], Fitted] = {}

    def fit(family: str, trainable: str) -> Fitted:
        if (family, trainable) not in known:
            vlm, events = tiny(family), list[TrainingEvent]()
            weights = copy.deepcopy(vlm.model.state_dict())
            method = TextGuidedAlignment.fit(
                vlm, guided[:5], config_of(family, trainable), progress=events.append
            )
            for name, value in vlm.model.state_dict().items():
                assert torch.equal(value, weights[name])
            losses = [dict(event.losses) for event in events if event.kind == "epoch"]
            known[family, trainable] = vlm, method, losses
        return known[family, trainable]

    return fit


@pytest.fixture(params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest, fitted: Callable[[str, str], Fitted]) -> Fitted:
    return fitted(*request.param)


@torch.no_grad()
def logits_of(vlm: VLM, sample: Sample) -> Tensor:
    inputs = encode(vlm, [sample.prompt], [open_images(sample)]).inputs
    logits: Tensor = vlm.model(**inputs).logits
    return logits


def state_of(vlm: VLM) -> tuple[Any, ...]:
    modules = list(vlm.model.modules())
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules]
    flags = [(p.requires_grad, p.data_ptr(), p.grad is None) for p in vlm.model.parameters()]
    return set(vlm.model.__dict__), hooks, flags, [module.training for module in modules]


def test_fitting_lowers_the_loss_and_raises_the_cosine(case: Fitted) -> None:
    _, _, losses = case
    total = [sum(epoch[name] for name in ("answer", "align", "pair")) for epoch in losses]
    assert total[-1] < total[0]
    assert losses[-1]["cosine"] > losses[0]["cosine"]


def test_it_is_a_method(case: Fitted) -> None:
    assert isinstance(case[1], Method)


def test_apply_changes_the_logits_and_gives_the_model_back(
    case: Fitted, guided: list[Sample]
) -> None:
    vlm, method, _ = case
    before, state = logits_of(vlm, guided[0]), state_of(vlm)
    with method.apply(vlm):
        assert not torch.allclose(logits_of(vlm, guided[0]), before, atol=1e-3)
    assert state_of(vlm) == state
    assert torch.equal(logits_of(vlm, guided[0]), before)


def test_apply_gives_the_model_back_after_an_error(case: Fitted) -> None:
    vlm, method, _ = case
    state = state_of(vlm)

    def fail() -> None:
        with method.apply(vlm):
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert state_of(vlm) == state


def test_strength_zero_is_the_identity_and_half_lies_between(
    case: Fitted, guided: list[Sample]
) -> None:
    vlm, method, _ = case
    before = logits_of(vlm, guided[0])
    with method.apply(vlm, strength=0.0):
        assert torch.equal(logits_of(vlm, guided[0]), before)
    name = vlm.layout.projector
    base = [p.detach().clone() for p in vlm.model.get_submodule(name).parameters()]
    with method.apply(vlm, strength=0.5):
        half = [p.detach().clone() for p in vlm.model.get_submodule(name).parameters()]
    with method.apply(vlm):
        full = [p.detach().clone() for p in vlm.model.get_submodule(name).parameters()]
    for a, b, c in zip(base, half, full, strict=True):
        torch.testing.assert_close(b, (a + c) / 2)


def test_saving_and_loading_gives_equal_logits(
    case: Fitted, guided: list[Sample], tmp_path: Path
) -> None:
    vlm, method, _ = case
    loaded = TextGuidedAlignment.load(method.save(tmp_path / "aligned"), vlm)
    with method.apply(vlm):
        expected = logits_of(vlm, guided[0])
    with loaded.apply(vlm):
        assert torch.equal(logits_of(vlm, guided[0]), expected)
    assert loaded.config == method.config
    assert loaded.metadata == method.metadata


def test_a_text_request_sees_a_new_projector_only_through_pictures(
    fitted: Callable[[str, str], Fitted], guided: list[Sample]
) -> None:
    vlm, method, _ = fitted("llava", "projector")
    before = logits_of(vlm, guided[5])
    with method.apply(vlm):
        assert torch.equal(logits_of(vlm, guided[5]), before)


@pytest.mark.parametrize("family", sorted(UNSUPPORTED))
def test_models_without_states_of_a_picture_are_refused(
    tiny: Callable[[str], VLM], guided: list[Sample], family: str
) -> None:
    with pytest.raises(SettingError, match="such as LLaVA"):
        TextGuidedAlignment.fit(tiny(family), guided, TextGuidedAlignmentConfig())


@pytest.mark.parametrize("trainable", ["projector+lora", "full"])
def test_what_is_fitted_in_place_equals_what_is_applied(
    tiny: Callable[[str], VLM], guided: list[Sample], trainable: str
) -> None:
    """The adapters' hooks and the merged weights must be the same model."""
    vlm, seen = tiny("llava"), list[Tensor]()

    def look() -> float:
        seen.append(logits_of(vlm, guided[0]))
        return float(len(seen))

    config = config_of("llava", trainable, epochs=2)
    method = TextGuidedAlignment.fit(vlm, guided[:3], config, validation=look)
    with method.apply(vlm):
        torch.testing.assert_close(logits_of(vlm, guided[0]), seen[-1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("trainable", ["projector+lora", "full"])
def test_a_second_stage_holds_the_first(
    guided: list[Sample], tmp_path: Path, trainable: str
) -> None:
    vlm = tiny_vlm("llava")
    first = TextGuidedAlignment.fit(vlm, guided[:3], config_of("llava", "projector", epochs=2))
    with first.apply(vlm):
        config = config_of("llava", trainable, epochs=1, learning_rate=1e-9)
        second = TextGuidedAlignment.fit(vlm, guided[:3], config)
    for name, value in first.tensors.items():
        torch.testing.assert_close(second.tensors[name], value)
    TextGuidedAlignment.load(second.save(tmp_path / "second"), tiny_vlm("llava"))


def test_held_out_samples_choose_the_epoch(
    tiny: Callable[[str], VLM], guided: list[Sample]
) -> None:
    config = config_of("llava", "projector", epochs=3, patience=1)
    method = TextGuidedAlignment.fit(tiny("llava"), guided[:3], config, validation=guided[3:5])
    assert all("score" in epoch for epoch in method.metadata.details["losses"])


def test_a_fit_goes_on_from_its_checkpoint(
    tiny: Callable[[str], VLM], guided: list[Sample], tmp_path: Path
) -> None:
    vlm, file, cache = tiny("llava"), tmp_path / "state.pt", tmp_path / "cache"
    config = config_of("llava", "projector+lora", epochs=4, teacher="base")

    def stop(event: TrainingEvent) -> None:
        if event.kind == "step" and event.epoch == 2:
            raise KeyboardInterrupt

    whole = TextGuidedAlignment.fit(vlm, guided, config)
    with pytest.raises(KeyboardInterrupt):
        TextGuidedAlignment.fit(vlm, guided, config, checkpoint=file, cache=cache, progress=stop)
    resumed = TextGuidedAlignment.fit(vlm, guided, config, checkpoint=file, cache=cache)
    for name, value in whole.tensors.items():
        torch.testing.assert_close(resumed.tensors[name], value)


def test_the_same_seed_gives_the_same_weights(
    tiny: Callable[[str], VLM], guided: list[Sample]
) -> None:
    config = config_of("llava", "projector+lora", epochs=1)
    first, second = (TextGuidedAlignment.fit(tiny("llava"), guided, config) for _ in range(2))
    for name, value in first.tensors.items():
        assert torch.equal(second.tensors[name], value)


def test_half_precision_models_keep_trained_weights_in_float32(guided: list[Sample]) -> None:
    from safebridge.models.load import load_vlm  # noqa: PLC0415 - the only test that loads

    vlm = load_vlm("tiny/llava", dtype="bfloat16")
    config = config_of("llava", "projector", epochs=2, learning_rate=1e-5)
    kept: list[torch.dtype] = []
    projector = vlm.layout.get(vlm.model, "projector")
    method = TextGuidedAlignment.fit(
        vlm,
        guided,
        config,
        progress=lambda _: kept.append(next(projector.parameters()).dtype),
    )
    assert set(kept) == {torch.float32}
    assert {value.dtype for value in method.tensors.values()} == {torch.bfloat16}
    assert next(projector.parameters()).dtype == torch.bfloat16


def test_two_alignments_cannot_be_in_a_model_at_a_time(
    fitted: Callable[[str, str], Fitted],
) -> None:
    vlm, method, _ = fitted("llava", "projector")
    with (
        method.apply(vlm),
        pytest.raises(SafebridgeError, match="already applied"),
        method.apply(vlm),
    ):
        pass


def test_a_negative_strength_is_refused(fitted: Callable[[str, str], Fitted]) -> None:
    vlm, method, _ = fitted("llava", "projector")
    with (
        pytest.raises(SettingError, match="0 is the model as it is"),
        method.apply(vlm, strength=-1.0),
    ):
        pass


def test_weights_of_another_model_are_refused(
    fitted: Callable[[str, str], Fitted], tiny: Callable[[str], VLM], tmp_path: Path
) -> None:
    _, method, _ = fitted("llava", "projector")
    folder = method.save(tmp_path / "aligned")
    other = tiny("internvl")
    with pytest.raises(ModelMismatchError, match="allow_other_model=True"):
        TextGuidedAlignment.load(folder, other)
    with pytest.raises(ShapeError, match="Load the model it was fitted on"):
        TextGuidedAlignment.load(folder, other, allow_other_model=True)


def test_a_folder_of_another_kind_is_refused(tiny: Callable[[str], VLM], tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"written by save\(\)"):
        TextGuidedAlignment.load(tmp_path, tiny("llava"))
