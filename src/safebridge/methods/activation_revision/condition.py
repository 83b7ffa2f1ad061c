"""Fits the gate of a revision: which prompts it is meant for."""

import random
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from safebridge.activations.capture import Activations, capture_activations, choose_layers
from safebridge.activations.gate import fit_gate
from safebridge.activations.probes import fit_probes, measure_probes, rank_sites
from safebridge.data.sample import Sample
from safebridge.errors import DataError
from safebridge.methods.activation_revision.config import ActivationRevisionConfig
from safebridge.methods.activation_revision.samples import UNSAFE
from safebridge.models.load import VLM

__all__ = ["GATE_TENSORS", "fit_condition"]

GATE_TENSORS: Final = ("gate_weight", "gate_center", "gate_scores")
"""Direction and centre of the gate, and its scores of held-out benign prompts."""

_FEWEST: Final = 4


def fit_condition(
    vlm: VLM,
    samples: Sequence[Sample],
    benign: Sequence[Sample],
    config: ActivationRevisionConfig,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Fit a gate that tells the prompts of the unsafe samples from benign ones.

    One half of the benign prompts makes the gate, the other one its threshold.

    Args:
        vlm: The model.
        samples: The samples of the fit; the prompts of the unsafe ones are what to revise.
        benign: Harmless requests.
        config: The settings.

    Returns:
        `GATE_TENSORS`, and the gate's layer and bias.

    Raises:
        DataError: If there are too few prompts of either kind.
    """
    harmful = _distinct([sample for sample in samples if sample.set_name == UNSAFE])
    harmless = _distinct(benign)
    if min(len(harmful), len(harmless)) < _FEWEST:
        raise DataError(
            f"a gate needs {_FEWEST} harmful and {_FEWEST} benign prompts, found {len(harmful)} "
            f'and {len(harmless)}. Pass benign=... samples to fit, or use gate="none".'
        )
    rng = random.Random(config.seed)
    harmless = rng.sample(harmless, len(harmless))
    half = len(harmless) // 2
    layers = choose_layers(vlm, [*harmful, *harmless], None)

    def states(own: Sequence[Sample]) -> Tensor:
        found: Activations = capture_activations(
            vlm, own, layers=layers, batch_size=config.batch_size
        )
        return found.tensors["resid_out"]

    bad, good, held_out = states(harmful), states(harmless[:half]), states(harmless[half:])
    index = (
        _find_best_layer((bad, harmful), (good, harmless[:half]), config.seed)
        if config.gate_layer == -1
        else layers.index(vlm.layout.layer_index(config.gate_layer))
    )
    gate = fit_gate(
        bad[:, index],
        good[:, index],
        kind=config.gate,
        layer=layers[index],
        false_alarm_rate=config.gate_false_alarm_rate,
        held_out=held_out[:, index],
    )
    tensors = {
        "gate_weight": gate.weight,
        "gate_center": gate.center,
        "gate_scores": gate.score(held_out[:, index]),
    }
    return tensors, {"layer": gate.layer, "bias": gate.bias}


def _find_best_layer(
    bad: tuple[Tensor, Sequence[Sample]], good: tuple[Tensor, Sequence[Sample]], seed: int
) -> int:
    """Return the layer whose probe, fitted on three quarters of the things, is best on the rest.

    A thing that stands on both sides would favour layers that know the picture again.
    """
    fit_parts, test_parts = zip(
        *(_split_things(states, samples, seed) for states, samples in (bad, good)), strict=True
    )
    probes = fit_probes(torch.cat(fit_parts), _is_first(*fit_parts))
    scores = measure_probes(probes, torch.cat(test_parts), _is_first(*test_parts))
    return int(rank_sites(*scores)[0])


def _split_things(states: Tensor, samples: Sequence[Sample], seed: int) -> tuple[Tensor, Tensor]:
    """Split states so that no thing, or where it is not known no sample, is on both sides."""
    names = [sample.concept or sample.id for sample in samples]
    things = sorted(set(names))
    if len(things) < _FEWEST:
        names = [sample.id for sample in samples]
        things = sorted(set(names))
    held_out = set(random.Random(seed).sample(things, max(1, len(things) // 4)))
    is_held_out = torch.tensor([name in held_out for name in names])
    return states[~is_held_out], states[is_held_out]


def _is_first(first: Tensor, second: Tensor) -> Tensor:
    return torch.arange(len(first) + len(second)) < len(first)


def _distinct(samples: Sequence[Sample]) -> list[Sample]:
    """Keep the first sample of each prompt and picture."""
    return list({(sample.prompt, sample.images): sample for sample in reversed(samples)}.values())
