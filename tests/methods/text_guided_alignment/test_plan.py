from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from safebridge.data.sample import Sample
from safebridge.errors import SettingError
from safebridge.methods.text_guided_alignment.config import TextGuidedAlignmentConfig
from safebridge.methods.text_guided_alignment.engine import Batch, GuidedEngine
from safebridge.methods.text_guided_alignment.method import TextGuidedAlignment
from safebridge.methods.text_guided_alignment.modules import train_parts
from safebridge.methods.text_guided_alignment.plan import (
    Workload,
    load_shapes,
    measure_plan,
    measure_teraflops,
)
from safebridge.models.load import VLM
from safebridge.models.tokens import Encoded
from safebridge.testing.tiny import tiny_vlm
from safebridge.training.loop import freeze

WORK = Workload(samples=1_000, teraflops=1.0)


@pytest.mark.parametrize("trainable", ["projector", "projector+lora", "full"])
def test_parameters_and_cache_are_those_of_the_fit(
    guided: list[Sample], tmp_path: Path, trainable: str
) -> None:
    vlm = tiny_vlm("llava")
    config = TextGuidedAlignmentConfig(trainable=trainable, teacher="base", layers="1-2")
    method = TextGuidedAlignment.fit(vlm, guided[:4], config, cache=tmp_path)
    plan = measure_plan(vlm.model, vlm.layout, config, replace(WORK, samples=4))
    assert plan.trained_parameters == sum(value.numel() for value in method.tensors.values())
    assert plan.parameters == sum(p.numel() for p in vlm.model.parameters())
    assert plan.cache_bytes == (tmp_path / "states.bin").stat().st_size
    assert plan.steps == method.metadata.details["steps"]


def count_operations(
    vlm: VLM, samples: list[Sample], config: TextGuidedAlignmentConfig
) -> tuple[int, Encoded]:
    """Let torch count the operations of one sample's loss and gradients."""
    vlm.model.set_attn_implementation("eager")  # torch counts no fused attention on the CPU
    with freeze(vlm.model), train_parts(vlm, config) as parts:
        engine = GuidedEngine(vlm, samples[:1], config, parts)
        encoded = engine._encode(samples[:1])
        with FlopCounterMode(display=False) as counter:
            engine.loss(Batch((0,), 0.0)).loss.backward()
    return counter.get_total_flops(), encoded


def workload_of(encoded: Encoded) -> Workload:
    """Describe the sample that was counted."""
    assert encoded.labels is not None
    image = int(encoded.spans.image.sum())
    return Workload(
        samples=1,
        image_tokens=image,
        text_tokens=encoded.labels.shape[1] - image,
        answer_tokens=int((encoded.labels >= 0).sum()) + 2,  # from before the first label on
        teraflops=1.0,
    )


@pytest.mark.parametrize("trainable", ["projector", "full"])
@pytest.mark.parametrize("has_checkpointing", [False, True])
def test_operations_are_those_that_torch_counts(
    guided: list[Sample], trainable: str, *, has_checkpointing: bool
) -> None:
    """Counted by torch on one sample; the norms are not planned."""
    vlm = tiny_vlm("llava")
    config = TextGuidedAlignmentConfig(
        trainable=trainable,
        batch_size=1,
        align_weight=0.0,
        pair_weight=0.0,
        retrieved="none",
        has_gradient_checkpointing=has_checkpointing,
    )
    counted, encoded = count_operations(vlm, guided, config)
    work = workload_of(encoded)
    plan = measure_plan(
        vlm.model, vlm.layout, replace(config, has_gradient_checkpointing=False), work
    )
    assert plan.flops == pytest.approx(counted, rel=0.1)
    again = measure_plan(vlm.model, vlm.layout, config, work)
    assert (again.flops > plan.flops) == has_checkpointing


def test_a_guide_apart_costs_the_backward_pass_that_torch_counts(guided: list[Sample]) -> None:
    counted, planned = [], []
    for trains in ("all", "projector"):
        vlm = tiny_vlm("llava")
        config = TextGuidedAlignmentConfig(
            trainable="full",
            teacher="base",
            retrieved="text_pass",
            guide_trains=trains,
            batch_size=1,
            layers=str(vlm.layout.num_layers - 1),
        )
        operations, encoded = count_operations(vlm, guided, config)
        counted.append(operations)
        planned.append(measure_plan(vlm.model, vlm.layout, config, workload_of(encoded)).flops)
    assert planned[1] - planned[0] == pytest.approx(counted[1] - counted[0], rel=0.1)


def plan_of(workload: Workload = WORK, **values: Any) -> Any:
    vlm = tiny_vlm("llava")
    return measure_plan(vlm.model, vlm.layout, TextGuidedAlignmentConfig(**values), workload)


def test_kept_text_states_cost_one_pass_and_others_one_per_epoch() -> None:
    kept = plan_of(epochs=4)
    moving = plan_of(epochs=4, trainable="projector+lora")
    plain = plan_of(epochs=4, align_weight=0.0, pair_weight=0.0)
    assert plain.text_flops_share == 0
    assert kept.cache_bytes > 0
    assert moving.cache_bytes == plain.cache_bytes == 0
    ratio = (moving.flops * moving.text_flops_share) / (kept.flops * kept.text_flops_share)
    assert ratio == pytest.approx(4)


def test_max_steps_bounds_the_time() -> None:
    assert plan_of(max_steps=2).steps == 2
    assert plan_of(max_steps=2).seconds < plan_of().seconds


def test_checkpointing_saves_memory_and_costs_time() -> None:
    plain, again = plan_of(), plan_of(has_gradient_checkpointing=True)
    assert again.activation_bytes < plain.activation_bytes
    assert again.flops > plain.flops


def test_a_plan_needs_no_weights(tmp_path: Path) -> None:
    vlm = tiny_vlm("llava")
    vlm.model.config.save_pretrained(tmp_path)  # a folder with a config and nothing else
    model, layout = load_shapes(str(tmp_path))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    plan = measure_plan(model, layout, TextGuidedAlignmentConfig(), WORK)
    expected = measure_plan(vlm.model, vlm.layout, TextGuidedAlignmentConfig(), WORK)
    assert plan == expected


def test_llava_1_5_7b_fits_the_published_sizes() -> None:
    """7.06 billion parameters, a projector of 21 million, 576 tokens of a picture."""
    from transformers import (  # noqa: PLC0415 - used here alone
        AutoModelForImageTextToText,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
    )

    from safebridge.models.families import find_layout  # noqa: PLC0415 - likewise

    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(vocab_size=32064), image_seq_length=576
    )
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    layout = find_layout(model)
    work = Workload(samples=558_000, teraflops=150.0)
    plan = measure_plan(
        model, layout, TextGuidedAlignmentConfig(layers="9-17", cache_dtype="bfloat16"), work
    )
    assert plan.parameters == pytest.approx(7.06e9, rel=0.01)
    assert plan.trained_parameters == pytest.approx(21e6, rel=0.01)
    assert plan.cache_bytes == 558_000 * 9 * 4096 * 2  # 74 KB each
    assert plan.tokens_per_sample == 576 + 48 + 96
    full = measure_plan(model, layout, TextGuidedAlignmentConfig(trainable="full"), work)
    assert full.optimizer_bytes == full.trained_parameters * 4 * 3
    assert "teraflop/s" in full.describe()
    assert full.to_json()["memory_bytes"] == full.memory_bytes


def test_impossible_workloads_are_refused() -> None:
    with pytest.raises(SettingError, match="at least one sample"):
        Workload(samples=0)
    with pytest.raises(SettingError, match="text_tokens must not be negative"):
        Workload(samples=1, text_tokens=-1)


def test_the_speed_of_this_machine_is_measured() -> None:
    assert 1e-4 < measure_teraflops() < 1e4
