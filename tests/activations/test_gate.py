"""Gates: thresholds that keep their promise, and scores by hand."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from safebridge.activations.capture import capture_activations
from safebridge.activations.gate import (
    PROBE_REGULARISATION,
    Gate,
    choose_threshold,
    fit_gate,
    fit_scaled_probes,
)
from safebridge.activations.revision import Edit, apply_edits
from safebridge.activations.scopes import TokenScope
from safebridge.analysis.activation_layers import measure_activation_layers
from safebridge.data.sample import Sample
from safebridge.errors import DataError, SettingError, ShapeError
from safebridge.testing.tiny import tiny_vlm


def clouds(seed: int, n: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shift = torch.tensor([2.0, 0.0, 0.0, 0.0])
    draw = torch.randn(2, n, 4, generator=generator) + 10  # far from the origin, as real states
    return draw[0] + shift, draw[1]


@pytest.mark.parametrize("kind", ["cosine", "probe"])
def test_a_gate_opens_for_harmful_prompts_and_keeps_its_rate(kind: str) -> None:
    harmful, harmless = clouds(0)
    new_harmful, new_harmless = clouds(1, n=4000)
    gate = fit_gate(
        harmful,
        harmless[:100],
        kind=kind,
        layer=3,
        false_alarm_rate=0.1,
        held_out=harmless[100:],
    )
    assert gate.layer == 3
    assert float(gate.is_open(new_harmless).float().mean()) < 0.16
    assert float(gate.is_open(new_harmful).float().mean()) > 0.5


def test_scaled_probes_are_those_of_scikit_learn() -> None:
    harmful, harmless = clouds(2)
    harmful[:, 3], harmless[:, 3] = 5.0, 5.0  # a feature that says nothing and has no spread
    probes, means = fit_scaled_probes(harmful[:, None], harmless[:, None])
    states = torch.cat([harmful, harmless])
    labels = [1] * len(harmful) + [0] * len(harmless)
    oracle = make_pipeline(StandardScaler(), LogisticRegression(C=PROBE_REGULARISATION, tol=1e-8))
    expected = oracle.fit(states.numpy(), labels).decision_function(states.numpy())
    found = probes.logits(states[:, None] - means)[:, 0]
    torch.testing.assert_close(found, torch.from_numpy(expected).double(), atol=1e-2, rtol=1e-2)


def test_the_threshold_lets_through_what_the_rate_allows() -> None:
    scores = torch.arange(99.0)
    # (1 + alarms) / (99 + 1) <= 0.05 allows four of these 99 scores at or above it.
    assert int((scores >= choose_threshold(scores, 0.05)).sum()) == 4
    assert not (scores >= choose_threshold(scores, 0.001)).any()


def test_the_promise_holds_for_new_prompts_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    rates = []
    for _ in range(2000):
        scores = torch.randn(40, generator=generator)
        rates.append(float((torch.randn(20, generator=generator)
                            >= choose_threshold(scores, 0.1)).float().mean()))  # fmt: skip
    assert sum(rates) / len(rates) <= 0.105


def test_scores_are_those_of_the_formulas() -> None:
    weight, center = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    state = torch.tensor([[3.0, 5.0]])
    cosine = Gate("cosine", 0, weight, center, 0.0, 0.5)
    assert cosine.score(state).item() == pytest.approx(3 / 5)
    assert cosine.is_open(state).item()
    probe = Gate("probe", 0, weight, torch.zeros(2), -2.0, 1.5)
    assert probe.score(state).item() == pytest.approx(1.0)
    assert not probe.is_open(state).item()


def test_errors_say_what_to_do() -> None:
    harmful, harmless = clouds(0)
    options = {"kind": "probe", "layer": 0, "false_alarm_rate": 0.1}
    with pytest.raises(SettingError, match="Choose cosine or probe"):
        fit_gate(harmful, harmless, **(options | {"kind": "tree"}))
    with pytest.raises(DataError, match="Pass benign"):
        fit_gate(harmful, harmless[:0], **options)
    with pytest.raises(SettingError, match="between 0 and 1"):
        choose_threshold(torch.ones(3), 0.0)
    with pytest.raises(DataError, match="Pass more"):
        choose_threshold(torch.ones(0), 0.1)
    with pytest.raises(ShapeError, match="or fit again"):
        fit_gate(harmful, harmless, **options).score(torch.ones(1, 3))


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_the_pass_that_reads_a_gate_is_not_what_is_captured(family: str) -> None:
    vlm = tiny_vlm(family)
    width, last = vlm.layout.hidden_size, vlm.layout.num_layers - 1
    edits = [Edit("resid_out", 0, torch.ones(width))]
    gate = Gate("probe", last, torch.zeros(width), torch.zeros(width), 0.0, -1.0)  # open to all
    samples = [Sample(str(n), "How?" + "!" * n) for n in range(3)]
    found = []
    for condition in (None, gate):
        with apply_edits(vlm, edits, scope=TokenScope("all"), gate=condition):
            states = capture_activations(vlm, samples, layers=[0]).tensors["resid_out"]
            lens = measure_activation_layers(vlm, samples)
        found.append((states, lens.summary()))
    torch.testing.assert_close(found[1][0], found[0][0])
    assert str(found[1][1]) == str(found[0][1])
    plain = capture_activations(vlm, samples, layers=[0]).tensors["resid_out"]
    torch.testing.assert_close(found[0][0], plain + 1, atol=1e-4, rtol=1e-4)
