"""What every method keeps on every family of models."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from safebridge.data.sample import Sample, open_images
from safebridge.methods.security_tensors.config import SecurityTensorsConfig
from safebridge.methods.security_tensors.method import SecurityTensors
from safebridge.models.load import VLM
from safebridge.models.tokens import encode
from safebridge.testing.tiny import TINY_FAMILIES
from safebridge.training.loop import TrainingEvent

PATCHED = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl"}  # their pixel_values are lists of patches
VARIANTS: dict[str, dict[str, Any]] = {
    "prefix": {},
    "after_image": {"position": "after_image"},
    "visual": {"modality": "visual", "visual_init_std": 0.5},
    "both": {"modality": "both", "visual_init_std": 0.5},
}
CASES = [
    (family, variant)
    for family in TINY_FAMILIES
    for variant in VARIANTS
    if variant != "visual" or family in {"llava", "qwen2_vl"}
]


class Case(NamedTuple):
    vlm: VLM
    method: SecurityTensors
    losses: list[dict[str, float]]
    family: str
    variant: str


@pytest.fixture(scope="module")
def fitted(tiny: Callable[[str], VLM], triad: list[Sample]) -> Callable[[str, str], Case]:
    known: dict[tuple[str, str], Case] = {}

    def fit(family: str, variant: str) -> Case:
        if (family, variant) not in known:
            config = SecurityTensorsConfig(
                num_virtual_tokens=3,
                epochs=6,
                batch_size=3,
                learning_rate=0.1,
                visual_learning_rate=0.1,
                **VARIANTS[variant],
            )
            events: list[TrainingEvent] = []
            method = SecurityTensors.fit(tiny(family), triad, config, progress=events.append)
            losses = [dict(event.losses) for event in events if event.kind == "epoch"]
            known[family, variant] = Case(tiny(family), method, losses, family, variant)
        return known[family, variant]

    return fit


@pytest.fixture(params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest, fitted: Callable[[str, str], Case]) -> Case:
    return fitted(*request.param)


def inputs_of(vlm: VLM, samples: Sequence[Sample], side: Any = "left") -> dict[str, Any]:
    return encode(
        vlm, [s.prompt for s in samples], [open_images(s) for s in samples], padding_side=side
    ).inputs


@torch.no_grad()
def logits_of(vlm: VLM, inputs: dict[str, Any], **more: Any) -> Tensor:
    logits: Tensor = vlm.model(**inputs, **more).logits
    return logits


def instance_state(vlm: VLM) -> tuple[set[str], list[Any], list[bool]]:
    hooks = [
        len(module._forward_hooks) + len(module._forward_pre_hooks)
        for module in vlm.model.modules()
    ]
    return set(vlm.model.__dict__), hooks, [p.requires_grad for p in vlm.model.parameters()]


def test_fitting_lowers_the_loss(case: Case) -> None:
    # The sum over the sets is what is fitted; a random model may trade one set for another.
    assert sum(case.losses[-1].values()) < sum(case.losses[0].values())


def test_apply_changes_the_logits_and_gives_the_model_back(case: Case, triad: list[Sample]) -> None:
    vlm, inputs = case.vlm, inputs_of(case.vlm, triad[:1])
    weights, state = copy.deepcopy(vlm.model.state_dict()), instance_state(vlm)
    before = logits_of(vlm, inputs)
    with case.method.apply(vlm):
        inside = logits_of(vlm, inputs)
    assert inside.shape == before.shape
    assert not torch.allclose(inside[:, -1], before[:, -1], atol=1e-3)
    assert torch.equal(logits_of(vlm, inputs), before)
    assert instance_state(vlm) == state
    for name, value in vlm.model.state_dict().items():
        assert torch.equal(value, weights[name])


def test_apply_gives_the_model_back_after_an_error(case: Case, triad: list[Sample]) -> None:
    vlm, state = case.vlm, instance_state(case.vlm)
    inputs = inputs_of(vlm, triad[:1])
    before = logits_of(vlm, inputs)

    def fail() -> None:
        with case.method.apply(vlm):
            logits_of(vlm, inputs)
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert instance_state(vlm) == state
    assert torch.equal(logits_of(vlm, inputs), before)


def test_strength_zero_is_the_identity(case: Case, triad: list[Sample]) -> None:
    inputs = inputs_of(case.vlm, triad[:2])
    before = logits_of(case.vlm, inputs)
    with case.method.apply(case.vlm, strength=0.0):
        assert torch.equal(logits_of(case.vlm, inputs), before)


def test_strength_grows_from_the_identity_to_the_fitted_tensor(
    case: Case, triad: list[Sample]
) -> None:
    inputs = inputs_of(case.vlm, triad[:1])
    found = {}
    for strength in (0.0, 1e-9, 1 - 1e-6, 1.0):
        with case.method.apply(case.vlm, strength=strength):
            found[strength] = logits_of(case.vlm, inputs)
    torch.testing.assert_close(found[1 - 1e-6], found[1.0], atol=1e-3, rtol=1e-3)
    if case.variant != "after_image":  # there the tokens also part image and text by n positions
        torch.testing.assert_close(found[1e-9], found[0.0], atol=1e-3, rtol=1e-3)


def test_save_load_apply_gives_equal_logits(
    case: Case, triad: list[Sample], tmp_path: Path
) -> None:
    loaded = SecurityTensors.load(case.method.save(tmp_path / "artifact"), case.vlm)
    inputs = inputs_of(case.vlm, triad[:2])
    with case.method.apply(case.vlm):
        expected = logits_of(case.vlm, inputs)
    with loaded.apply(case.vlm):
        assert torch.equal(logits_of(case.vlm, inputs), expected)
    assert loaded.config == case.method.config
    assert loaded.metadata == case.method.metadata


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_its_rows(case: Case, triad: list[Sample], side: str) -> None:
    samples = triad[:4]
    batch = inputs_of(case.vlm, samples, side)
    with case.method.apply(case.vlm):
        together = logits_of(case.vlm, batch)
        for row, sample in enumerate(samples):
            alone = logits_of(case.vlm, inputs_of(case.vlm, [sample]))[0]
            found = together[row, batch["attention_mask"][row].bool()]
            torch.testing.assert_close(found, alone, atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_cached_decoding_equals_one_full_forward(
    case: Case, triad: list[Sample], strength: float
) -> None:
    vlm, inputs = case.vlm, inputs_of(case.vlm, triad[:2])
    width = inputs["input_ids"].shape[1]
    with case.method.apply(vlm, strength=strength), torch.no_grad():
        output = vlm.model.generate(
            **inputs,
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        uncached = vlm.model.generate(
            **inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=False
        )
        assert torch.equal(output.sequences, uncached)
        assert torch.equal(output.sequences[:, :width], inputs["input_ids"])
        assert output.sequences.shape[1] == width + 4
        full = logits_of(vlm, continued(case.family, inputs, output.sequences))
    for step, logits in enumerate(output.logits):
        torch.testing.assert_close(logits.float(), full[:, width - 1 + step], atol=2e-4, rtol=2e-3)


def continued(family: str, inputs: dict[str, Any], sequences: Tensor) -> dict[str, Any]:
    """Return the inputs with generated tokens as part of the prompt."""
    width = inputs["input_ids"].shape[1]
    new = sequences[:, width:]
    longer = dict(inputs, input_ids=sequences)
    is_suffix = int(family == "paligemma")  # an answer does not see what comes after it
    fills = {"attention_mask": 1, "token_type_ids": is_suffix, "mm_token_type_ids": 0}
    for name, fill in fills.items():
        if name in inputs:
            longer[name] = torch.cat([inputs[name], torch.full_like(new, fill)], dim=1)
    if "cross_attention_mask" in inputs:
        mask = inputs["cross_attention_mask"]
        last = mask[:, -1:].expand(-1, new.shape[1], -1, -1)
        longer["cross_attention_mask"] = torch.cat([mask, last], dim=1)
    return longer


def test_a_cache_filled_by_hand_equals_one_full_forward(case: Case, triad: list[Sample]) -> None:
    vlm, inputs = case.vlm, inputs_of(case.vlm, triad[:1])
    if case.family == "instructblip":
        pytest.skip("its forward takes a picture at every step")
    token = inputs["input_ids"][:, -1:]
    with case.method.apply(vlm), torch.no_grad():
        ids = torch.cat([inputs["input_ids"], token], dim=1)
        longer = continued(case.family, inputs, ids)
        full = logits_of(vlm, longer)[:, -1]
        cache = vlm.model(**inputs, use_cache=True).past_key_values
        step = {"input_ids": token, "attention_mask": longer["attention_mask"]}
        if case.family in PATCHED:  # transformers takes no mask over the cache there
            del step["attention_mask"]
        if "cross_attention_mask" in longer:
            step["cross_attention_mask"] = longer["cross_attention_mask"][:, -1:]
        found = vlm.model(**step, past_key_values=cache, use_cache=True).logits[:, -1]
    torch.testing.assert_close(found, full, atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 2, "num_return_sequences": 2, "do_sample": False},
        {"do_sample": True, "num_return_sequences": 2},
        {"do_sample": False, "repetition_penalty": 1.5},
    ],
    ids=["beams", "several", "sampling", "penalty"],
)
def test_generate_returns_the_prompt_as_it_was(
    case: Case, triad: list[Sample], options: dict[str, Any]
) -> None:
    vlm, inputs = case.vlm, inputs_of(case.vlm, triad[:2])
    with case.method.apply(vlm), torch.random.fork_rng():
        torch.manual_seed(0)
        found = vlm.model.generate(**inputs, max_new_tokens=3, **options)
    rows = inputs["input_ids"].repeat_interleave(options.get("num_return_sequences", 1), dim=0)
    width = rows.shape[1]
    assert torch.equal(found[:, :width], rows)
    assert width < found.shape[1] <= width + 3


def test_inputs_samples_and_config_stay_as_they_were(case: Case, triad: list[Sample]) -> None:
    inputs = inputs_of(case.vlm, triad[:2])
    before, held = copy.deepcopy(inputs), dict(case.method.tensors)
    kept = {name: value.clone() for name, value in held.items()}
    with case.method.apply(case.vlm, strength=0.5):
        logits_of(case.vlm, inputs)
        case.vlm.model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert inputs.keys() == before.keys()
    for name, value in inputs.items():
        assert torch.equal(value, before[name])
    for name, value in held.items():
        assert torch.equal(value, kept[name])


def test_fitting_leaves_the_samples_as_they_were(
    tiny: Callable[[str], VLM], triad: list[Sample]
) -> None:
    before = [replace(sample) for sample in triad]
    config = SecurityTensorsConfig(num_virtual_tokens=2, max_steps=1)
    SecurityTensors.fit(tiny("llava"), triad, config)
    assert triad == before
