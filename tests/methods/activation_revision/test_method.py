"""What the method keeps on every family, and that it equals independent implementations."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from safebridge.activations.capture import capture_activations
from safebridge.data.sample import Sample, open_images
from safebridge.errors import DataError, ModelMismatchError, SettingError, ShapeError
from safebridge.methods.activation_revision.condition import GATE_TENSORS
from safebridge.methods.activation_revision.config import ActivationRevisionConfig
from safebridge.methods.activation_revision.method import CONTROLS, ActivationRevision
from safebridge.methods.protocol import Method
from safebridge.models.load import VLM
from safebridge.models.tokens import encode
from safebridge.testing.tiny import TINY_FAMILIES

VARIANTS: dict[str, dict[str, Any]] = {
    "head-mms": {},
    "head-probe": {"vector": "probe", "scope": "all"},
    "layer-mms": {"level": "layer"},
    "layer-pca": {"level": "layer", "vector": "pca", "site": "mlp_out", "norm_guard": "keep"},
    "gated": {"gate": "probe", "gate_false_alarm_rate": 0.5},
}
CASES = [
    (family, variant)
    for family in TINY_FAMILIES
    for variant in VARIANTS
    if variant in {"head-mms", "layer-mms"} or family in {"llava", "mllama", "qwen2_vl"}
]
CLOSE = {"atol": 2e-4, "rtol": 2e-3}


class Case(NamedTuple):
    vlm: VLM
    method: ActivationRevision


@pytest.fixture(scope="module")
def fitted(
    tiny: Callable[[str], VLM], answered: list[Sample], benign: list[Sample]
) -> Callable[[str, str], Case]:
    known: dict[tuple[str, str], Case] = {}

    def fit(family: str, variant: str) -> Case:
        if (family, variant) not in known:
            config = ActivationRevisionConfig(top_k=3, **VARIANTS[variant])
            method = ActivationRevision.fit(tiny(family), answered, config, benign=benign)
            known[family, variant] = Case(tiny(family), method)
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


def state_of(vlm: VLM) -> tuple[set[str], list[int]]:
    hooks = [
        len(module._forward_hooks) + len(module._forward_pre_hooks)
        for module in vlm.model.modules()
    ]
    return set(vlm.model.__dict__), hooks


def test_it_is_a_method(fitted: Callable[[str, str], Case]) -> None:
    assert isinstance(fitted("llava", "head-mms").method, Method)


def test_directions_point_towards_safe(case: Case, answered: list[Sample]) -> None:
    tensors, place = case.method.tensors, case.method.config.place
    captured = capture_activations(
        case.vlm, answered, places=[place], read_position="last_response_token"
    ).tensors[place]
    states = captured.flatten(1, 2) if place == "heads" else captured
    directions = tensors["directions"]
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(len(directions)))
    projected = (states * directions).sum(-1)
    is_safe = torch.tensor([sample.set_name == "safe" for sample in answered])
    assert bool((projected[is_safe].mean(0) > projected[~is_safe].mean(0)).all())
    torch.testing.assert_close(tensors["sigma"], projected.std(0, correction=0), **CLOSE)


def test_apply_changes_the_logits_and_gives_the_model_back(
    case: Case, requests: list[Sample]
) -> None:
    vlm, inputs = case.vlm, inputs_of(case.vlm, requests[:1])
    weights, state = copy.deepcopy(vlm.model.state_dict()), state_of(vlm)
    before = logits_of(vlm, inputs)
    with case.method.apply(vlm, strength=3.0):
        inside = logits_of(vlm, inputs)
    assert inside.shape == before.shape
    is_shut = case.method.gate is not None and torch.equal(inside, before)
    assert is_shut or not torch.allclose(inside[:, -1], before[:, -1], atol=1e-3)
    assert torch.equal(logits_of(vlm, inputs), before)
    assert state_of(vlm) == state
    for name, value in vlm.model.state_dict().items():
        assert torch.equal(value, weights[name])


def test_strength_zero_is_the_identity_and_minus_one_the_opposite(
    case: Case, requests: list[Sample]
) -> None:
    inputs = inputs_of(case.vlm, requests[:2])
    before = logits_of(case.vlm, inputs)
    with case.method.apply(case.vlm, strength=0.0):
        assert torch.equal(logits_of(case.vlm, inputs), before)
    with case.method.apply(case.vlm, strength=-1.0):
        backwards = logits_of(case.vlm, inputs)
    with case.method.control("opposite").apply(case.vlm):
        torch.testing.assert_close(logits_of(case.vlm, inputs), backwards)


def test_save_load_apply_gives_equal_logits(
    case: Case, requests: list[Sample], tmp_path: Path
) -> None:
    loaded = ActivationRevision.load(case.method.save(tmp_path / "artifact"), case.vlm)
    inputs = inputs_of(case.vlm, requests[:2])
    with case.method.apply(case.vlm):
        expected = logits_of(case.vlm, inputs)
    with loaded.apply(case.vlm):
        assert torch.equal(logits_of(case.vlm, inputs), expected)
    assert loaded.config == case.method.config
    assert loaded.metadata == case.method.metadata
    assert loaded.sites == case.method.sites


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_its_rows(case: Case, requests: list[Sample], side: str) -> None:
    batch = inputs_of(case.vlm, requests[:4], side)
    with case.method.apply(case.vlm):
        together = logits_of(case.vlm, batch)
        for row, sample in enumerate(requests[:4]):
            alone = logits_of(case.vlm, inputs_of(case.vlm, [sample]))[0]
            found = together[row, batch["attention_mask"][row].bool()]
            torch.testing.assert_close(found, alone, **CLOSE)


def test_cached_decoding_equals_decoding_without_a_cache(
    case: Case, requests: list[Sample]
) -> None:
    inputs = inputs_of(case.vlm, requests[:2])
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with case.method.apply(case.vlm), torch.no_grad():
        cached = case.vlm.model.generate(**inputs, **options)
        assert torch.equal(cached, case.vlm.model.generate(**inputs, **options, use_cache=False))


def test_inputs_samples_and_tensors_stay_as_they_were(case: Case, answered: list[Sample]) -> None:
    samples = [replace(sample) for sample in answered]
    inputs = inputs_of(case.vlm, answered[:2])
    before = copy.deepcopy(inputs)
    kept = {name: value.clone() for name, value in case.method.tensors.items()}
    with case.method.apply(case.vlm, strength=0.5):
        logits_of(case.vlm, inputs)
        case.vlm.model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert all(torch.equal(value, before[name]) for name, value in inputs.items())
    assert all(torch.equal(value, kept[name]) for name, value in case.method.tensors.items())
    assert samples == answered


def plain_inputs(vlm: VLM, inputs: dict[str, Any], blocks: Sequence[Any]) -> list[Tensor]:
    seen: list[Tensor] = []
    hooks = [b.register_forward_pre_hook(lambda _m, a: seen.append(a[0])) for b in blocks]
    logits_of(vlm, inputs)
    for hook in hooks:
        hook.remove()
    return seen


def plain_iti(
    vlm: VLM, samples: Sequence[Sample], config: ActivationRevisionConfig, inputs: dict[str, Any]
) -> tuple[set[tuple[int, int]], Tensor]:
    """ITI once more, head by head and sample by sample, with scikit-learn's probes."""
    linear = pytest.importorskip("sklearn.linear_model")
    layers, heads = range(vlm.layout.num_layers), vlm.layout.num_heads
    bank: dict[tuple[int, int], list[Tensor]] = {(i, h): [] for i in layers for h in range(heads)}
    blocks = [layer.self_attn.o_proj for layer in vlm.layout.get(vlm.model, "decoder_layers")]
    for sample in samples:
        encoded = encode(vlm, [sample.prompt], [open_images(sample)], [sample.answer or ""])
        column = int(encoded.spans.answer[0].nonzero()[-2, 0])  # before the end-of-turn token
        seen = plain_inputs(vlm, encoded.inputs, blocks)
        for layer in layers:
            for head, part in enumerate(seen[layer][0, column].chunk(heads)):
                bank[layer, head].append(part)
    labels = [sample.set_name == "safe" for sample in samples]
    names = sorted({sample.id.split("#")[0] for sample in samples})
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(config.seed))
    count = max(1, round(config.validation_ratio * len(names)))
    validation = {names[i] for i in order[:count].tolist()}
    is_held_out = [sample.id.split("#")[0] in validation for sample in samples]
    scores, shifts = {}, {}
    for site, states in bank.items():
        x = torch.stack(states).double()
        rows = [i for i, held in enumerate(is_held_out) if not held]
        probe = linear.LogisticRegression(tol=1e-8, max_iter=10_000)
        probe.fit(x[rows].numpy(), [labels[i] for i in rows])
        rest = [i for i, held in enumerate(is_held_out) if held]
        right = probe.predict(x[rest].numpy()) == [labels[i] for i in rest]
        p = probe.predict_log_proba(x[rest].numpy())
        loss = -sum(p[k, int(labels[i])] for k, i in enumerate(rest)) / len(rest)
        scores[site] = (-right.mean(), loss, site)
        safe = torch.stack([v for v, y in zip(states, labels, strict=True) if y]).mean(0)
        unsafe = torch.stack([v for v, y in zip(states, labels, strict=True) if not y]).mean(0)
        theta = (safe - unsafe) / (safe - unsafe).norm()
        projected = torch.stack([v @ theta for v in states])
        shifts[site] = 15.0 * projected.std(correction=0) * theta
    chosen = sorted(scores, key=lambda site: scores[site])[: config.top_k]
    width = vlm.layout.head_dim

    def revise(layer: int) -> Callable[..., Any]:
        def hook(_module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            hidden = args[0].clone()
            for head in (h for i, h in chosen if i == layer):
                hidden[:, -1, head * width : (head + 1) * width] += shifts[layer, head]
            return (hidden,)

        return hook

    hooks = [block.register_forward_pre_hook(revise(i)) for i, block in enumerate(blocks)]
    logits = logits_of(vlm, inputs)[:, -1]
    for hook in hooks:
        hook.remove()
    return set(chosen), logits


def test_heads_and_logits_equal_those_of_a_plain_loop_iti(
    tiny: Callable[[str], VLM], answered: list[Sample], requests: list[Sample]
) -> None:
    vlm, config = tiny("llava"), ActivationRevisionConfig(top_k=4)
    inputs = inputs_of(vlm, requests[:1])
    sites, expected = plain_iti(vlm, answered, config, inputs)
    method = ActivationRevision.fit(vlm, answered, config)
    assert set(method.sites) == sites
    with method.apply(vlm):
        found = logits_of(vlm, inputs)[:, -1]
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_layer_vectors_and_logits_equal_those_of_steering_vectors(
    tiny: Callable[[str], VLM], reminded: list[Sample], pictures: list[Path]
) -> None:
    library = pytest.importorskip("steering_vectors")
    vlm, layer = tiny("llava"), 2
    assert pictures
    text = [replace(sample, images=()) for sample in reminded]
    config = ActivationRevisionConfig(level="layer", top_k=1, layers=str(layer), scope="all")
    method = ActivationRevision.fit(vlm, text, config)

    def rendered(sample: Sample) -> str:
        ids = inputs_of(vlm, [sample])["input_ids"][0]
        return str(vlm.tokenizer.decode(ids))

    pairs = [
        (rendered(safe), rendered(unsafe))
        for safe, unsafe in zip(text[::2], text[1::2], strict=True)
    ]
    names = {"decoder_block": f"{vlm.layout.decoder_layers}.{{num}}"}
    steering = library.train_steering_vector(
        vlm.model, vlm.tokenizer, pairs, layers=[layer], layer_config=names
    )
    (edit,) = method.edits()
    torch.testing.assert_close(edit.shift, steering.layer_activations[layer], **CLOSE)
    inputs = inputs_of(vlm, text[:1])
    with steering.apply(vlm.model, layer_config=names):
        expected = logits_of(vlm, inputs)
    with method.apply(vlm):
        torch.testing.assert_close(logits_of(vlm, inputs), expected, **CLOSE)


def test_captured_activations_can_be_shared(
    tiny: Callable[[str], VLM], answered: list[Sample], tmp_path: Path
) -> None:
    vlm = tiny("llava")
    captured = capture_activations(
        vlm, answered, places=["heads"], read_position="last_response_token"
    )
    plain = ActivationRevision.fit(vlm, answered)
    shared = ActivationRevision.fit(vlm, answered, captured=captured)
    cached = ActivationRevision.fit(vlm, answered, cache=tmp_path / "bank")
    for name, value in plain.tensors.items():
        torch.testing.assert_close(shared.tensors[name], value)
        torch.testing.assert_close(cached.tensors[name], value)
    with pytest.raises(DataError, match="Capture these samples"):
        ActivationRevision.fit(vlm, answered[:8], captured=captured)


def test_a_reference_bank_changes_sigma_alone(
    tiny: Callable[[str], VLM], answered: list[Sample], benign: list[Sample]
) -> None:
    vlm = tiny("llava")
    own = ActivationRevision.fit(vlm, answered)
    other = ActivationRevision.fit(vlm, answered, reference=benign)
    assert torch.equal(own.tensors["directions"], other.tensors["directions"])
    assert not torch.allclose(own.tensors["sigma"], other.tensors["sigma"])


def test_samples_without_answers_are_read_at_the_prompt(
    tiny: Callable[[str], VLM], reminded: list[Sample]
) -> None:
    method = ActivationRevision.fit(tiny("llava"), reminded)
    assert method.metadata.details["read_position"] == "last_prompt_token"


def test_select_chooses_again_without_a_fit(fitted: Callable[[str, str], Case]) -> None:
    method = fitted("llava", "head-mms").method
    more = method.select(top_k=5, layers="1-2", alpha=2.0)
    assert len(more.sites) == 5
    assert {layer for layer, _ in more.sites} <= {1, 2}
    assert len(method.sites) == 3
    with pytest.raises(SettingError, match="Fit again with them"):
        method.select(vector="probe")
    with pytest.raises(SettingError, match="was not fitted"):
        method.select(gate="cosine")


def test_controls_have_the_same_length_and_other_places_or_ways(
    fitted: Callable[[str, str], Case],
) -> None:
    method = fitted("llava", "layer-mms").method
    own = {edit.layer: edit.shift for edit in method.edits()}
    for name in CONTROLS:
        other = {edit.layer: edit.shift for edit in method.control(name, seed=7).edits()}
        assert len(other) == len(own)
        if name == "random-sites":
            continue
        for layer, shift in own.items():
            torch.testing.assert_close(other[layer].norm(), shift.norm())
            cosine = torch.cosine_similarity(other[layer], shift, dim=0)
            assert float(cosine) == pytest.approx(-1.0) if name == "opposite" else cosine < 0.9
    draws = {method.control("random-sites", seed=seed).sites for seed in range(8)}
    assert len(draws) > 1
    with pytest.raises(SettingError, match="Choose random-sites"):
        method.control("nothing")


def test_a_gate_follows_its_false_alarm_rate(fitted: Callable[[str, str], Case]) -> None:
    method = fitted("llava", "gated").method
    strict = method.select(gate_false_alarm_rate=0.01).gate
    assert strict is not None
    assert method.gate is not None
    assert strict.threshold > method.gate.threshold
    assert method.select(gate="none").gate is None


def test_more_harmful_requests_reach_the_gate_and_are_kept(
    tiny: Callable[[str], VLM], answered: list[Sample], benign: list[Sample], tmp_path: Path
) -> None:
    vlm = tiny("llava")
    config = ActivationRevisionConfig(gate="probe", gate_layer=0, gate_false_alarm_rate=0.5)
    more = [Sample(f"m{number}", "How come" + "?" * number) for number in range(1, 5)]

    def gate_of(harmful: list[Sample], cache: Path | None) -> dict[str, Tensor]:
        method = ActivationRevision.fit(
            vlm, answered, config, harmful=harmful, benign=benign, cache=cache
        )
        return {name: method.tensors[name] for name in GATE_TENSORS}

    alone, wide = gate_of([], None), gate_of(more, None)
    assert not torch.equal(alone["gate_weight"], wide["gate_weight"])
    for _ in range(2):  # the second time from disk
        kept = gate_of(more, tmp_path)
        for name, value in wide.items():
            torch.testing.assert_close(kept[name], value)


def test_other_models_are_refused_unless_on_purpose(
    fitted: Callable[[str, str], Case], tiny: Callable[[str], VLM], tmp_path: Path
) -> None:
    folder = fitted("llava", "head-mms").method.save(tmp_path / "artifact")
    other = tiny("llava_next")
    with pytest.raises(ModelMismatchError, match="allow_other_model=True"):
        ActivationRevision.load(folder, other)
    assert ActivationRevision.load(folder, other, allow_other_model=True).sites
    with pytest.raises(ShapeError, match="or fit again"):
        ActivationRevision.load(folder, tiny("paligemma"), allow_other_model=True)


def test_wrong_samples_and_strengths_are_refused(
    fitted: Callable[[str, str], Case], answered: list[Sample], benign: list[Sample]
) -> None:
    vlm, method = fitted("llava", "head-mms")
    gated = ActivationRevisionConfig(gate="cosine")
    with pytest.raises(DataError, match="Pass benign"):
        ActivationRevision.fit(vlm, answered, gated, benign=benign[:1])
    with pytest.raises(SettingError, match="are for a gate"):
        ActivationRevision.fit(vlm, answered, harmful=benign)
    with pytest.raises(DataError, match="name the read_position"):
        ActivationRevision.fit(vlm, [*answered[1:], replace(answered[0], answer=None)])
    with (
        pytest.raises(SettingError, match="1 is as fitted"),
        method.apply(vlm, strength=float("nan")),
    ):
        pass
