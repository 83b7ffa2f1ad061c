from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from safebridge.data.sample import Sample, open_images
from safebridge.methods.security_tensors.application import apply_tensors
from safebridge.methods.security_tensors.cache import TensorCache
from safebridge.methods.security_tensors.config import SecurityTensorsConfig
from safebridge.methods.security_tensors.decoder_engine import DecoderEngine
from safebridge.methods.security_tensors.engines import ModelEngine, build_engine
from safebridge.methods.security_tensors.modules import SecurityTensorModule, build_module
from safebridge.methods.security_tensors.prepare import prepare_samples
from safebridge.models.hooks import capture_output
from safebridge.models.load import VLM
from safebridge.models.tokens import encode
from safebridge.testing.tiny import TINY_FAMILIES
from safebridge.training.loop import freeze

WHOLE_MODEL = {"gemma3", "mllama", "paligemma", "qwen3_vl"}
"""Their decoders take more than embeddings, a mask and positions."""


def config_of(**options: object) -> SecurityTensorsConfig:
    return SecurityTensorsConfig(num_virtual_tokens=3, **options)


def decoder_engine(
    vlm: VLM,
    samples: list[Sample],
    config: SecurityTensorsConfig,
    *,
    is_shared: bool = True,
    cache: TensorCache | None = None,
) -> tuple[DecoderEngine, SecurityTensorModule]:
    inputs = encode(vlm, ["a"], [open_images(samples[0])]).inputs
    module = build_module(vlm, config, inputs)
    prepared = prepare_samples(vlm, samples, max_answer_tokens=config.max_answer_tokens)
    assert prepared is not None
    engine = DecoderEngine(vlm, samples, config, module, prepared, is_shared=is_shared, cache=cache)
    return engine, module


def losses_and_gradients(
    engine: DecoderEngine | ModelEngine, module: SecurityTensorModule, indices: list[int]
) -> list[torch.Tensor]:
    losses = engine.losses(indices)
    return [losses, *torch.autograd.grad(losses.sum(), list(module.parameters()))]


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_the_decoder_alone_is_used_where_it_is_enough(
    tiny: Callable[[str], VLM], triad: list[Sample], family: str
) -> None:
    vlm, config = tiny(family), config_of()
    with freeze(vlm.model):
        engine = build_engine(vlm, triad, config, build_module(vlm, config, None))
    assert isinstance(engine, ModelEngine if family in WHOLE_MODEL else DecoderEngine)


@pytest.mark.parametrize("max_answer_tokens", [0, 2])
@pytest.mark.parametrize("benign_loss", ["ce", "kl"])
@pytest.mark.parametrize("position", ["prefix", "after_image"])
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "instructblip", "pixtral"])
def test_the_decoder_alone_gives_the_losses_and_gradients_of_the_whole_model(
    tiny: Callable[[str], VLM],
    triad: list[Sample],
    family: str,
    position: str,
    benign_loss: str,
    max_answer_tokens: int,
) -> None:
    vlm = tiny(family)
    config = config_of(
        position=position, benign_loss=benign_loss, max_answer_tokens=max_answer_tokens
    )
    indices = [0, 3, 1, 5]
    with freeze(vlm.model):
        engine, module = decoder_engine(vlm, triad, config)
        found = engine.losses(indices)
        assert module.tokens is not None
        (grad,) = torch.autograd.grad(found.sum(), module.tokens)
        expected = ModelEngine(vlm, triad, config, module).losses(indices)
        (expected_grad,) = torch.autograd.grad(expected.sum(), module.tokens)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(grad, expected_grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("position", ["prefix", "after_image"])
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "llava_next"])
def test_shared_and_unshared_tokens_have_the_same_losses_and_gradients(
    tiny: Callable[[str], VLM], triad: list[Sample], family: str, position: str
) -> None:
    vlm, config, results = tiny(family), config_of(position=position), []
    with freeze(vlm.model):
        for is_shared in (True, False):
            engine, module = decoder_engine(vlm, triad, config, is_shared=is_shared)
            results.append(losses_and_gradients(engine, module, list(range(6))))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-5, rtol=1e-4)


def test_what_stands_before_the_virtual_tokens_is_computed_once_per_picture(
    tiny: Callable[[str], VLM], triad: list[Sample], tmp_path: Path
) -> None:
    vlm, config = tiny("llava"), config_of(position="after_image")
    first, _ = decoder_engine(vlm, triad, config, cache=TensorCache(tmp_path))
    with capture_output(vlm.layout.get(vlm.model, "final_norm")) as passes:
        before = first.losses([0, 1, 2])
        assert len(passes) == 1 + 1  # the pictures together, and the batch
        assert passes[0].shape[0] == 3
        first.losses([0, 1, 2])
        assert len(passes) == 1 + 2
        second, _ = decoder_engine(vlm, triad, config, cache=TensorCache(tmp_path))
        assert torch.equal(second.losses([0, 1, 2]), before)
        assert len(passes) == 1 + 3  # found on disk by another fit
    # The batch itself holds the virtual tokens and what follows the picture, and no more.
    longest = max(len(e.input_ids) - at for e, at in zip(first.prepared.examples, first.insertions,
                                                         strict=True))  # fmt: skip
    assert passes[-1].shape[1] <= longest + 3


@pytest.mark.parametrize("kl_top_k", [0, 8])
@pytest.mark.parametrize("modality", ["visual", "both"])
@pytest.mark.parametrize("position", ["prefix", "after_image"])
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_vl", "pixtral", "instructblip"])
def test_a_visual_tensor_through_the_decoder_alone_has_the_gradients_of_the_whole_model(
    tiny: Callable[[str], VLM],
    triad: list[Sample],
    family: str,
    position: str,
    modality: str,
    kl_top_k: int,
) -> None:
    vlm = tiny(family)
    config = config_of(modality=modality, position=position, benign_loss="kl", kl_top_k=kl_top_k)
    indices = [0, 4, 1, 5]  # 0 and 4, 1 and 5 show the same pictures
    with freeze(vlm.model):
        engine, module = decoder_engine(vlm, triad, config)
        found = losses_and_gradients(engine, module, indices)
        expected = losses_and_gradients(ModelEngine(vlm, triad, config, module), module, indices)
    # Where two tokens nearly tie, rounding decides which of them is among the likeliest.
    atol = 1e-3 if kl_top_k else 2e-4
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=atol, rtol=2e-3)


def test_under_a_visual_tensor_each_distinct_picture_of_a_batch_passes_the_tower_once(
    tiny: Callable[[str], VLM], triad: list[Sample]
) -> None:
    vlm, rows = tiny("llava"), []
    engine, _ = decoder_engine(vlm, triad, config_of(modality="visual"))
    tower = vlm.layout.get(vlm.model, "vision_tower")
    handle = tower.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    try:
        engine.losses([0, 4, 1, 5])
    finally:
        handle.remove()
    assert rows == [2]


@pytest.mark.parametrize("family", ["llava", "mllama", "gemma3"])
def test_checkpointed_layers_give_the_same_gradients_from_less_memory(
    tiny: Callable[[str], VLM], triad: list[Sample], family: str
) -> None:
    vlm, results, kept = tiny(family), [], []
    for is_on in (False, True):
        config = config_of(modality="both", is_gradient_checkpointed=is_on)
        inputs = encode(vlm, ["a"], [open_images(triad[0])]).inputs
        with freeze(vlm.model):
            module = build_module(vlm, config, inputs)
            engine = build_engine(vlm, triad, config, module)
            assert isinstance(engine, ModelEngine) or not is_on
            whole = ModelEngine(vlm, triad, config, module)
            size = 0

            def pack(tensor: torch.Tensor) -> torch.Tensor:
                nonlocal size
                size += tensor.numel()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                losses = whole.losses([0, 1, 2])
            kept.append(size)
            gradients = torch.autograd.grad(losses.sum(), list(module.parameters()))
            results.append([losses, *gradients])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    assert kept[1] < kept[0] / 2


def test_samples_with_and_without_pictures_share_a_batch(
    tiny: Callable[[str], VLM], triad: list[Sample]
) -> None:
    vlm, config = tiny("llava"), config_of(position="after_image")
    mixed = [triad[0], Sample(id="t", prompt="Hi", answer="Hello.", set_name="GB"), triad[1]]
    with freeze(vlm.model):
        engine, module = decoder_engine(vlm, mixed, config)
        whole = ModelEngine(vlm, mixed, config, module)
        found = engine.losses([0, 1, 2])
        expected = torch.cat([whole.losses([index]) for index in range(3)])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_each_distinct_picture_passes_the_tower_once(
    tiny: Callable[[str], VLM], triad: list[Sample]
) -> None:
    vlm = tiny("llava")
    samples = triad * 3
    tower = vlm.layout.get(vlm.model, "vision_tower")
    rows = []
    handle = tower.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    try:
        engine, _ = decoder_engine(vlm, samples, config_of())
        engine.losses([0, 1, 2])
    finally:
        handle.remove()
    assert sum(rows) == len({sample.images for sample in samples})


def test_the_head_runs_at_answer_tokens_alone(
    tiny: Callable[[str], VLM], triad: list[Sample]
) -> None:
    vlm = tiny("llava")
    engine, _ = decoder_engine(vlm, triad, config_of())
    labels = sum(int((engine.prepared.examples[i].labels != -100).sum()) for i in (0, 1))
    with capture_output(vlm.layout.get(vlm.model, "lm_head")) as logits:
        engine.losses([0, 1])
    assert [len(rows) for rows in logits] == [labels]


@pytest.mark.parametrize("top_k", [0, 5])
def test_the_undefended_distribution_is_computed_once_per_sample(
    tiny: Callable[[str], VLM], triad: list[Sample], top_k: int
) -> None:
    vlm = tiny("llava")
    engine, _ = decoder_engine(vlm, triad, config_of(benign_loss="kl", kl_top_k=top_k))
    with capture_output(vlm.layout.get(vlm.model, "final_norm")) as passes:
        first = engine.losses([0, 1])
        again = engine.losses([0, 1])
    # The prefix and the batch each time, and the undefended batch the first time alone.
    assert len(passes) == 5
    assert torch.equal(first, again)


def test_bfloat16_arithmetic_gives_nearly_the_same_loss(
    tiny: Callable[[str], VLM], triad: list[Sample]
) -> None:
    vlm = tiny("llava")
    exact, _ = decoder_engine(vlm, triad, config_of())
    rough, _ = decoder_engine(vlm, triad, config_of(autocast="bfloat16"))
    torch.testing.assert_close(
        rough.losses([0, 1, 2]), exact.losses([0, 1, 2]), atol=0.2, rtol=0.05
    )
    assert not torch.equal(rough.losses([0]), exact.losses([0]))


def test_a_decoder_that_does_more_than_its_embeddings_say_is_found_out(
    tiny: Callable[[str], VLM], triad: list[Sample]
) -> None:
    vlm, config = tiny("llava"), config_of()
    # What stands in for the head here is not what the model's own forward does.
    handle = vlm.model.register_forward_hook(
        lambda _m, _a, output: output.__class__(**{**output, "logits": 2 * output.logits})
    )
    try:
        with freeze(vlm.model):
            engine = build_engine(vlm, triad, config, build_module(vlm, config, None))
    finally:
        handle.remove()
    assert isinstance(engine, ModelEngine)


def test_the_losses_are_those_of_the_applied_tensor(
    tiny: Callable[[str], VLM], triad: list[Sample]
) -> None:
    vlm, sample = tiny("llava"), triad[0]
    with freeze(vlm.model), torch.no_grad():
        engine, module = decoder_engine(vlm, triad, config_of())
        encoded = encode(vlm, [sample.prompt], [open_images(sample)], [sample.answer or ""])
        with apply_tensors(vlm, tokens=module.tokens, pixels=None):
            output = vlm.model(**encoded.inputs, labels=encoded.labels)
        torch.testing.assert_close(engine.losses([0])[0], output.loss, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("position", ["prefix", "after_image"])
def test_a_tensor_for_pictures_learns_nothing_from_text_alone(
    tiny: Callable[[str], VLM], triad: list[Sample], position: str
) -> None:
    vlm = tiny("llava")
    samples = [replace(triad[0], images=(), prompt="How is it made?"), *triad]
    with freeze(vlm.model):
        config = config_of(position=position, applies_to="pictures")
        engine, module = decoder_engine(vlm, samples, config)
        whole = ModelEngine(vlm, samples, config, module)
        losses, gradient = losses_and_gradients(engine, module, [0, 3, 1])
        shown = losses_and_gradients(whole, module, [3, 1])
        text = losses_and_gradients(engine, module, [0])
        undefended = SecurityTensorModule(torch.zeros(3, vlm.layout.hidden_size), None)
        undefended.tokens = None
        plain = ModelEngine(vlm, samples, config, undefended).losses([0])
    torch.testing.assert_close(losses[1:], shown[0], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(gradient, shown[1], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(losses[:1], plain, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(text[1], torch.zeros_like(text[1]))
