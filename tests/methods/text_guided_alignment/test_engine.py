"""The loss of a batch: what moves, what stays, and what is read how often."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from safebridge.data.sample import Sample, open_images
from safebridge.errors import DataError
from safebridge.methods.text_guided_alignment import engine as engine_module
from safebridge.methods.text_guided_alignment.config import TextGuidedAlignmentConfig
from safebridge.methods.text_guided_alignment.engine import Batch, GuidedEngine
from safebridge.methods.text_guided_alignment.modules import checkpoint_layers, train_parts
from safebridge.methods.text_guided_alignment.states import capture_text_states
from safebridge.models.load import VLM
from safebridge.models.tokens import encode
from safebridge.training.loop import StepLoss, freeze

FIRST = Batch((0, 1, 2), 0.0)


def gradients(
    vlm: VLM, samples: Sequence[Sample], config: TextGuidedAlignmentConfig, batch: Batch = FIRST
) -> tuple[StepLoss, dict[str, Tensor]]:
    """Return the loss of a batch and the gradient of everything that is trained."""
    with ExitStack() as stack:
        stack.enter_context(freeze(vlm.model))
        if config.has_gradient_checkpointing:
            stack.enter_context(checkpoint_layers(vlm))
        parts = stack.enter_context(train_parts(vlm, config))
        step = GuidedEngine(vlm, samples, config, parts).loss(batch)
        step.loss.backward()
        trained = {**parts.weights, **parts.adapters}
        found = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for name, p in trained.items()
        }
    return step, found


GUIDE_ONLY = {"answer_weight": 0.0, "layers": "1-2"}


@pytest.mark.parametrize("form", ["paper", "repository"])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0)], ids=["align", "pair"])
@pytest.mark.parametrize("has_checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_each_guide_term_alone_moves_the_projector(
    tiny: Callable[[str], VLM],
    guided: list[Sample],
    form: str,
    weights: tuple[float, float],
    *,
    has_checkpointing: bool,
) -> None:
    config = TextGuidedAlignmentConfig(
        **GUIDE_ONLY,
        form=form,
        align_weight=weights[0],
        pair_weight=weights[1],
        has_gradient_checkpointing=has_checkpointing,
    )
    _, found = gradients(tiny("llava"), guided, config)
    assert {name.split(".")[1] for name in found} == {"multi_modal_projector"}
    for name, gradient in found.items():
        assert gradient.abs().max() > 0, name


def test_a_detached_guide_leaves_the_gradient_of_the_answers_alone(
    tiny: Callable[[str], VLM], guided: list[Sample]
) -> None:
    """The control: the released code's loss value rises, its gradients do not change."""
    vlm = tiny("llava")
    plain, of_plain = gradients(
        vlm, guided, TextGuidedAlignmentConfig(align_weight=0.0, pair_weight=0.0)
    )
    released, of_released = gradients(
        vlm, guided, TextGuidedAlignmentConfig(form="repository", is_guide_detached=True)
    )
    _, of_intended = gradients(vlm, guided, TextGuidedAlignmentConfig(form="repository"))
    assert released.loss > plain.loss
    for name, gradient in of_plain.items():
        assert torch.equal(of_released[name], gradient)
        assert not torch.allclose(of_intended[name], gradient)


@pytest.mark.parametrize("has_checkpointing", [False, True])
def test_a_guide_for_the_projector_leaves_everything_after_it_to_the_answers(
    tiny: Callable[[str], VLM], guided: list[Sample], *, has_checkpointing: bool
) -> None:
    config = TextGuidedAlignmentConfig(
        trainable="full", has_gradient_checkpointing=has_checkpointing
    )
    whole, of_whole = gradients(tiny("llava"), guided, config)
    step, found = gradients(tiny("llava"), guided, replace(config, guide_trains="projector"))
    _, of_answers = gradients(
        tiny("llava"), guided, replace(config, align_weight=0.0, pair_weight=0.0)
    )
    assert step.loss.item() == pytest.approx(whole.loss.item(), abs=1e-6)
    is_after = [name for name in found if "multi_modal_projector" not in name]
    assert len(is_after) < len(found)
    for name, gradient in found.items():
        expected = of_answers if name in is_after else of_whole
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4)
    assert any(not torch.allclose(of_whole[name], of_answers[name]) for name in is_after)


def test_gradient_checkpointing_gives_the_same_gradients(
    tiny: Callable[[str], VLM], guided: list[Sample]
) -> None:
    for trainable in ("projector+lora", "full"):
        config = TextGuidedAlignmentConfig(trainable=trainable)
        _, expected = gradients(tiny("llava"), guided, config)
        _, found = gradients(
            tiny("llava"), guided, replace(config, has_gradient_checkpointing=True)
        )
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4)


def test_the_caption_side_has_no_gradient(tiny: Callable[[str], VLM], guided: list[Sample]) -> None:
    """With the text pass in the graph, moving everything would also move the caption."""
    vlm = tiny("llava")
    states = capture_text_states(vlm, [guided[0].caption], [0, 3])
    assert not states.requires_grad
    assert states.shape == (2, 1, vlm.layout.hidden_size)


@pytest.mark.parametrize("is_detached", [True, False])
def test_the_retrieved_text_gets_a_gradient_only_if_asked_for(
    tiny: Callable[[str], VLM], guided: list[Sample], *, is_detached: bool
) -> None:
    config = TextGuidedAlignmentConfig(
        trainable="full", answer_weight=0.0, align_weight=0.0, is_retrieved_detached=is_detached
    )
    vlm = tiny("llava")
    _, found = gradients(vlm, guided, config, Batch((0,), 0.0))
    name = f"{vlm.layout.embed_tokens}.weight"
    # Only the prefix holds these letters; a picture after it sees them through attention too,
    # so it is the size of the gradient that tells, and both are compared below.
    letters = vlm.tokenizer("dg", add_special_tokens=False)["input_ids"]
    other = gradients(
        vlm, guided, replace(config, is_retrieved_detached=not is_detached), Batch((0,), 0.0)
    )[1]
    assert not torch.allclose(found[name][letters], other[name][letters])


def test_a_batch_equals_the_mean_of_its_samples(
    tiny: Callable[[str], VLM], guided: list[Sample]
) -> None:
    """Padding and neighbours do not enter the states that are compared."""
    vlm = tiny("llava")
    config = TextGuidedAlignmentConfig(answer_weight=0.0)
    together, _ = gradients(vlm, guided, config)
    alone = [gradients(vlm, guided, config, Batch((i,), 0.0))[0].loss.item() for i in range(3)]
    assert together.loss.item() == pytest.approx(sum(alone) / 3, abs=1e-5)


def test_samples_without_picture_or_caption_count_in_the_answers_alone(
    tiny: Callable[[str], VLM], guided: list[Sample]
) -> None:
    config = TextGuidedAlignmentConfig()
    step, found = gradients(tiny("llava"), guided, config, Batch((5,), 0.0))
    assert set(step.by_set) == {"answer"}
    assert step.loss.isfinite()
    assert all(gradient.eq(0).all() for gradient in found.values())
    mixed = [guided[0], replace(guided[1], caption=""), replace(guided[2], retrieved="")]
    step, _ = gradients(tiny("llava"), mixed, config)
    assert {name: count for name, (_, count) in step.by_set.items()} == {
        "answer": 3,
        "align": 2,
        "pair": 1,
        "cosine": 2,
    }
    assert step.loss.isfinite()


def test_the_retrieved_text_stands_before_the_picture_and_does_not_see_it(
    tiny: Callable[[str], VLM], guided: list[Sample]
) -> None:
    vlm, sample = tiny("llava"), guided[0]
    pictures = [open_images(sample), open_images(guided[1])]
    encoded = encode(
        vlm,
        ["How?", "How?"],
        pictures,
        prefixes=["A dog", "A dog"],
        prefix_format="Retrieved Text: {}. ",
    )
    ids = encoded.inputs["input_ids"]
    assert vlm.tokenizer.decode(ids[0][encoded.spans.prefix[0]]) == "A dog"
    assert encoded.spans.prefix.int().argmax() < encoded.spans.image.int().argmax()
    with torch.no_grad():
        hidden = vlm.model(**encoded.inputs, output_hidden_states=True).hidden_states[-2]
    prefix = hidden[encoded.spans.prefix].view(2, -1, vlm.layout.hidden_size)
    torch.testing.assert_close(prefix[0], prefix[1])


def test_a_caption_is_read_the_same_alone_and_in_a_padded_batch(
    tiny: Callable[[str], VLM],
) -> None:
    vlm = tiny("llava")
    texts = ["A cat", "A very much longer caption of a dog", ""]
    together = capture_text_states(vlm, texts, [1, 3])
    for row, text in enumerate(texts):
        alone = capture_text_states(vlm, [text], [1, 3])[:, 0]
        torch.testing.assert_close(together[:, row], alone, atol=1e-5, rtol=1e-4)
    assert together[:, 2].eq(0).all()


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Note every batch of texts that a model reads."""
    seen: list[list[str]] = []

    def read(vlm: VLM, texts: Sequence[str], *args: Any, **options: Any) -> Tensor:
        seen.append(list(texts))
        return capture_text_states(vlm, texts, *args, **options)

    monkeypatch.setattr(engine_module, "capture_text_states", read)
    return seen


@pytest.mark.parametrize(
    ("trainable", "teacher", "reads"),
    [("projector", "current", 1), ("full", "base", 1), ("full", "current", 2)],
)
def test_captions_are_read_once_where_they_cannot_change(
    tiny: Callable[[str], VLM],
    guided: list[Sample],
    monkeypatch: pytest.MonkeyPatch,
    trainable: str,
    teacher: str,
    reads: int,
) -> None:
    seen, vlm = count_reads(monkeypatch), tiny("llava")
    config = TextGuidedAlignmentConfig(trainable=trainable, teacher=teacher)
    with freeze(vlm.model), train_parts(vlm, config) as parts:
        engine = GuidedEngine(vlm, guided, config, parts)
        first, second = engine.loss(FIRST), engine.loss(FIRST)
    assert len(seen) == reads
    torch.testing.assert_close(first.loss, second.loss)


def test_the_base_teacher_does_not_follow_the_fit(
    tiny: Callable[[str], VLM], guided: list[Sample]
) -> None:
    vlm = tiny("llava")
    values = {}
    for trainable in ("full", "projector+lora"):
        for teacher in ("base", "current"):
            config = TextGuidedAlignmentConfig(trainable=trainable, teacher=teacher)
            with freeze(vlm.model), train_parts(vlm, config) as parts, torch.no_grad():
                engine = GuidedEngine(vlm, guided, config, parts)
                before = engine._read(["A cat"])
                for parameter in {**parts.weights, **parts.adapters}.values():
                    parameter.add_(torch.full_like(parameter, 0.05))
                values[trainable, teacher] = torch.equal(engine._read(["A cat"]), before)
    assert values == {
        ("full", "base"): True,
        ("full", "current"): False,
        ("projector+lora", "base"): True,
        ("projector+lora", "current"): False,
    }


def test_texts_read_alone_leave_the_prompt_as_it_is(
    tiny: Callable[[str], VLM], guided: list[Sample]
) -> None:
    vlm = tiny("llava")
    quiet = TextGuidedAlignmentConfig(align_weight=0.0, pair_weight=0.0, retrieved="none")
    plain, _ = gradients(vlm, guided, quiet)
    alone, _ = gradients(vlm, guided, TextGuidedAlignmentConfig(retrieved="text_pass"))
    prefixed, _ = gradients(vlm, guided, TextGuidedAlignmentConfig(retrieved="prefix"))
    assert alone.by_set["answer"] == plain.by_set["answer"]
    assert prefixed.by_set["answer"] != plain.by_set["answer"]
    assert alone.by_set["pair"][1] == 3


def test_the_plain_template_writes_the_picture_and_the_answer_alone(
    tiny: Callable[[str], VLM], guided: list[Sample]
) -> None:
    vlm = tiny("llava")
    config = TextGuidedAlignmentConfig(template="plain", pair_weight=0.0, retrieved="none")
    with freeze(vlm.model), train_parts(vlm, config) as parts:
        engine = GuidedEngine(vlm, guided, config, parts)
        encoded = engine._encode(guided[:1])
        assert engine.loss(FIRST).loss.isfinite()
    ids = encoded.inputs["input_ids"][0]
    text = vlm.tokenizer.decode(ids[~encoded.spans.image[0]])
    assert text == "A cat." + vlm.tokenizer.eos_token


def test_an_answer_is_needed_where_it_counts(
    tiny: Callable[[str], VLM], guided: list[Sample]
) -> None:
    vlm, samples = tiny("llava"), [replace(guided[0], answer=None)]
    config = TextGuidedAlignmentConfig()
    with train_parts(vlm, config) as parts, pytest.raises(DataError, match="answer_weight=0"):
        GuidedEngine(vlm, samples, config, parts)
    step, _ = gradients(vlm, samples, replace(config, answer_weight=0.0), Batch((0,), 0.0))
    assert set(step.by_set) == {"align", "pair", "cosine"}


def test_batches_know_how_far_the_run_is(tiny: Callable[[str], VLM], guided: list[Sample]) -> None:
    vlm = tiny("llava")
    config = TextGuidedAlignmentConfig(batch_size=2)
    with train_parts(vlm, config) as parts:
        engine = GuidedEngine(vlm, guided, config, parts)
        progress = [batch.progress for epoch in (0, 1) for batch in engine.batches(epoch, 8)]
    assert progress == [number / 8 for number in range(8)]
