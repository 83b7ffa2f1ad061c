import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from safebridge.analysis.activation_layers import (
    ActivationReport,
    ActivationRow,
    bypass_layers,
    find_layer_words,
    find_refusal_tokens,
    measure_activation_layers,
    measure_bypass,
    measure_replacement,
    replace_image_states,
)
from safebridge.data.sample import Sample, open_images
from safebridge.errors import DataError, SettingError
from safebridge.methods.text_guided_alignment.states import capture_layers
from safebridge.models.generate import generate_answers
from safebridge.models.load import VLM
from safebridge.models.tokens import encode

REFUSE, RARE, OTHER, MORE = 0, 1, 2, 3
FAMILIES = ["llava", "qwen2_vl", "mllama", "gemma3"]


def shares(*rows: list[float]) -> torch.Tensor:
    table = torch.tensor(rows, dtype=torch.float64)
    return table / table.sum(dim=1, keepdim=True)


GROWING = shares(
    [0.10, 1e-7, 0.60, 0.30],  # the embedding
    [0.10, 1e-5, 0.60, 0.30],  # 0: the rare word has by far the largest factor, but stays rare
    [0.30, 1e-5, 0.50, 0.20],  # 1: the refusal word trebles
    [0.70, 1e-5, 0.20, 0.10],  # 2: and is the likeliest
    [0.60, 1e-5, 0.30, 0.10],  # 3: still the likeliest
    [0.20, 1e-5, 0.70, 0.10],  # 4: no longer
)


def test_layers_of_a_case_solved_by_hand() -> None:
    assert find_layer_words(GROWING, [REFUSE], top=1) == (1, 1, 3)


def test_without_a_floor_a_rare_word_wins_the_first_layer() -> None:
    """The reason for the floor: the log-ratio of noise."""
    assert find_layer_words(GROWING, [RARE], floor=0.0, top=1)[0] == 0
    assert find_layer_words(GROWING, [RARE], floor=1e-4, top=1)[0] is None


def test_a_word_that_never_grows_is_never_activated() -> None:
    falling = shares([0.5, 0.1, 0.2, 0.2], [0.3, 0.1, 0.3, 0.3], [0.1, 0.1, 0.4, 0.4])
    assert find_layer_words(falling, [REFUSE], top=4) == (None, None, None)


def test_both_criteria_equal_a_plain_loop() -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        table = torch.rand(6, 12, generator=generator, dtype=torch.float64).pow(3).softmax(-1)
        words = [2, 7]
        ratio = difference = end = None
        for layer in range(5):
            before, after = table[layer].tolist(), table[layer + 1].tolist()
            factors = [math.log(a / b) for a, b in zip(after, before, strict=True)]
            steps = [a - b for a, b in zip(after, before, strict=True)]
            if ratio is None and factors.index(max(factors)) in words:
                ratio = layer
            best = sorted(range(12), key=lambda word: -steps[word])[:2]
            if difference is None and any(word in words and steps[word] > 0 for word in best):
                difference = layer
            if difference is not None and after.index(max(after)) in words:
                end = layer
        assert find_layer_words(table, words, floor=0.0, top=2) == (ratio, difference, end)


def test_refusal_words_come_from_the_tokenizer(tiny: Callable[[str], VLM]) -> None:
    tokenizer = tiny("llava").tokenizer
    found = find_refusal_tokens(tokenizer, ["sorry", "No"])
    # Byte-level: the letters that the words begin with, not the space before them.
    assert sorted(tokenizer.decode([token]) for token in found) == ["N", "s"]
    with pytest.raises(DataError, match="Pass others"):
        find_refusal_tokens(tokenizer, ["..."])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_is_the_models_own_distribution(
    tiny: Callable[[str], VLM], shown: list[Sample], family: str
) -> None:
    """The norm is applied once at the end, not twice."""
    vlm, words = tiny(family), [5, 9]
    report = measure_activation_layers(vlm, shown[:2], refusal_tokens=words, batch_size=1)
    with torch.no_grad():
        expected = [
            vlm.model(**encode(vlm, [s.prompt], [open_images(s)]).inputs).logits[0, -1]
            for s in shown[:2]
        ]
    own = torch.stack(expected).float().softmax(-1)[:, words].sum(dim=1).mean().item()
    assert len(report.refusal_probability) == vlm.layout.num_layers
    assert report.refusal_probability[-1] == pytest.approx(own, rel=1e-3)
    firsts = torch.stack(expected).argmax(-1).tolist()
    assert [row.is_refusal for row in report.rows] == [first in words for first in firsts]


def test_batches_do_not_change_the_rows(tiny: Callable[[str], VLM], shown: list[Sample]) -> None:
    vlm = tiny("llava")
    mixed = [*shown, Sample("text", "A much longer question without any picture?")]
    one = measure_activation_layers(vlm, mixed, batch_size=1)
    many = measure_activation_layers(vlm, mixed, batch_size=4)
    assert one.rows == many.rows
    assert [row.id for row in many.rows] == [sample.id for sample in mixed]


def test_samples_that_never_activate_are_counted_apart() -> None:
    rows = (
        ActivationRow("a", 3, 2, 5, is_refusal=True),
        ActivationRow("b", None, 4, None, is_refusal=False),
        ActivationRow("c", None, None, None, is_refusal=False),
    )
    summary = ActivationReport(rows, (0.1,), (1,)).summary()
    assert summary["paper_start"] == {"layers": {3: 1}, "median": 3, "activated": 1, "never": 2}
    assert summary["repository_start"]["median"] == 3
    assert summary["repository_start"]["layers"] == {2: 1, 4: 1}
    assert ActivationReport(rows[2:], (0.1,), (1,)).summary()["end"]["median"] is None


def test_no_samples_are_refused(tiny: Callable[[str], VLM]) -> None:
    with pytest.raises(DataError, match="Pass requests"):
        measure_activation_layers(tiny("llava"), [])


def stream_of(vlm: VLM, inputs: dict[str, Any]) -> tuple[list[Tensor], Tensor]:
    """Return what each layer passes on, and the logits.

    Transformers' own `output_hidden_states` would show what layers return before it is changed.
    """
    with capture_layers(vlm, range(vlm.layout.num_layers)) as states:
        logits = vlm.model(**inputs, use_cache=False).logits
    return states, logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bypassed_layer_does_nothing_and_comes_back(
    tiny: Callable[[str], VLM], shown: list[Sample], family: str
) -> None:
    vlm = tiny(family)
    inputs = encode(vlm, ["How?"], [open_images(shown[0])]).inputs
    with torch.no_grad():
        before, logits = stream_of(vlm, inputs)
        with bypass_layers(vlm, [1, -1]):
            inside, changed = stream_of(vlm, inputs)
        after = vlm.model(**inputs).logits
    assert torch.equal(inside[1], inside[0])
    assert torch.equal(inside[-1], inside[-2])
    assert torch.equal(inside[0], before[0])
    assert not torch.allclose(inside[2], before[2])
    assert not torch.allclose(changed, logits)
    assert torch.equal(after, logits)


def test_windows_are_tried_one_after_the_other(
    tiny: Callable[[str], VLM], shown: list[Sample]
) -> None:
    vlm, seen = tiny("llava"), []

    def judge(answer: str) -> bool:
        seen.append(answer)
        return len(seen) % 2 == 0

    rows = measure_bypass(vlm, shown[:2], judge, width=3, max_new_tokens=3)
    assert [row.layers for row in rows] == [(), (0, 1, 2), (1, 2, 3)]
    assert all(row.refused == (False, True) for row in rows)
    assert rows[0].refusal_rate == 0.5
    own = generate_answers(vlm, ["How?"] * 2, [open_images(s) for s in shown[:2]], max_new_tokens=3)
    assert seen[:2] == own
    assert seen[2:4] != own


@pytest.mark.parametrize("width", [0, 5])
def test_a_window_must_fit_the_model(
    tiny: Callable[[str], VLM], shown: list[Sample], width: int
) -> None:
    with pytest.raises(SettingError, match="Choose width and stride"):
        measure_bypass(tiny("llava"), shown, bool, width=width)


def test_replaced_image_states_reach_later_layers_alone(
    tiny: Callable[[str], VLM], shown: list[Sample]
) -> None:
    vlm = tiny("llava")
    encoded = encode(vlm, ["How?"], [open_images(shown[0])])
    state = torch.full((1, vlm.layout.hidden_size), 0.5)
    with torch.no_grad():
        before, logits = stream_of(vlm, encoded.inputs)
        with replace_image_states(vlm, 1, state, encoded.spans.image):
            inside, changed = stream_of(vlm, encoded.inputs)
        after = vlm.model(**encoded.inputs).logits
    mask = encoded.spans.image
    assert torch.equal(inside[0], before[0])
    assert inside[1][mask].eq(0.5).all()
    assert torch.equal(inside[1][~mask], before[1][~mask])
    assert not torch.allclose(changed, logits)
    assert torch.equal(after, logits)


def test_replacing_is_measured_layer_by_layer(
    tiny: Callable[[str], VLM], shown: list[Sample]
) -> None:
    vlm, seen = tiny("llava"), []

    def judge(answer: str) -> bool:
        seen.append(answer)
        return True

    rows = measure_replacement(vlm, shown[:3], judge, layers=[2, 0], max_new_tokens=3, batch_size=2)
    assert [row.layers for row in rows] == [(), (2,), (0,)]
    assert all(len(row.refused) == 3 for row in rows)
    own = generate_answers(vlm, ["How?"] * 2, [open_images(s) for s in shown[:2]], max_new_tokens=3)
    assert seen[:2] == own
    assert set(seen) != set(own)


def test_a_replacement_needs_picture_and_caption(
    tiny: Callable[[str], VLM], shown: list[Sample]
) -> None:
    with pytest.raises(DataError, match="needs a picture and a caption"):
        measure_replacement(tiny("llava"), [replace(shown[0], caption="")], bool)
