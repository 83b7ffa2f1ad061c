"""Fits the gate of a revision: which prompts it is meant for."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from safebridge.activations.capture import capture_activations, choose_layers
from safebridge.activations.gate import fit_gate, fit_scaled_probes
from safebridge.activations.store import capture_to_disk
from safebridge.data.sample import Sample
from safebridge.errors import DataError
from safebridge.methods.activation_revision.config import ActivationRevisionConfig
from safebridge.methods.activation_revision.samples import UNSAFE
from safebridge.models.load import VLM

__all__ = ["GATE_TENSORS", "fit_condition"]

GATE_TENSORS: Final = ("gate_weight", "gate_center", "gate_scores")
"""Direction and centre of the gate, and its scores of held-out benign prompts."""

_FEWEST: Final = 4
_FOR_THE_LAYER: Final = 0.25
_FOR_THE_THRESHOLD: Final = 1 / 3


def fit_condition(
    vlm: VLM,
    samples: Sequence[Sample],
    config: ActivationRevisionConfig,
    *,
    harmful: Sequence[Sample],
    benign: Sequence[Sample],
    cache: Path | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Fit a gate that tells harmful prompts from benign ones.

    Two thirds of the benign prompts make the gate and one third its threshold. The two parts
    are about other things, so the threshold holds for things that the gate has not seen.

    Args:
        vlm: The model.
        samples: The samples of the fit; the prompts of the unsafe ones are what to revise.
        config: The settings.
        harmful: More harmful requests.
        benign: Harmless requests.
        cache: Folder that the prompts' states are written to and resumed from.

    Returns:
        `GATE_TENSORS`, and the gate's layer and bias.

    Raises:
        DataError: If there are too few prompts of either kind.
    """
    unsafe = [sample for sample in samples if sample.set_name == UNSAFE]
    bad, good = _distinct([*unsafe, *harmful]), _distinct(benign)
    if min(len(bad), len(good)) < _FEWEST:
        raise DataError(
            f"a gate needs {_FEWEST} harmful and {_FEWEST} benign prompts, found {len(bad)} "
            f'and {len(good)}. Pass benign=... samples to fit, or use gate="none".'
        )
    layers = choose_layers(vlm, [*bad, *good], None)
    states = _capture(vlm, [*bad, *good], layers, config.batch_size, cache)
    is_held_out = _hold_out(good, _FOR_THE_THRESHOLD, config.seed)
    bad_states, good_states = states[: len(bad)], states[len(bad) :][~is_held_out]
    held_out = states[len(bad) :][is_held_out]
    if config.gate_layer == -1:
        kept = [own for own, is_out in zip(good, is_held_out.tolist(), strict=True) if not is_out]
        index = _find_best_layer((bad_states, bad), (good_states, kept), config.seed)
    else:
        index = layers.index(vlm.layout.layer_index(config.gate_layer))
    gate = fit_gate(
        bad_states[:, index],
        good_states[:, index],
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


def _capture(
    vlm: VLM,
    samples: Sequence[Sample],
    layers: Sequence[int],
    batch_size: int,
    cache: Path | None,
) -> Float[Tensor, "n layers hidden"]:
    """Return the states at the end of the prompts."""
    if cache is None:
        found = capture_activations(vlm, samples, layers=layers, batch_size=batch_size)
        return found.tensors["resid_out"]
    store = capture_to_disk(vlm, samples, cache, layers=layers, batch_size=batch_size)
    return torch.stack([store.read("resid_out", layer) for layer in layers], dim=1)


def _find_best_layer(
    bad: tuple[Tensor, Sequence[Sample]], good: tuple[Tensor, Sequence[Sample]], seed: int
) -> int:
    """Return the layer whose probe, fitted on three quarters of the things, is best on the rest.

    A thing that stands on both sides would favour layers that know the picture again. Best is
    the largest area under the curve, whatever the threshold.
    """
    masks = [_hold_out(samples, _FOR_THE_LAYER, seed) for _, samples in (bad, good)]
    fit = [states[~mask] for (states, _), mask in zip((bad, good), masks, strict=True)]
    test = [states[mask] for (states, _), mask in zip((bad, good), masks, strict=True)]
    probes, center = fit_scaled_probes(*fit)
    above, below = (probes.logits(states - center) for states in test)
    areas = [
        float((one[:, None] > other[None]).double().mean())
        for one, other in zip(above.T, below.T, strict=True)
    ]
    return max(range(len(areas)), key=areas.__getitem__)


def _hold_out(samples: Sequence[Sample], share: float, seed: int) -> Bool[Tensor, " n"]:
    """Choose samples so that no thing, or where it is not known no sample, is on both sides."""
    names = [sample.concept or sample.id for sample in samples]
    things = sorted(set(names))
    if len(things) < _FEWEST:
        names = [sample.id for sample in samples]
        things = sorted(set(names))
    chosen = set(random.Random(seed).sample(things, max(1, round(share * len(things)))))
    return torch.tensor([name in chosen for name in names])


def _distinct(samples: Sequence[Sample]) -> list[Sample]:
    """Keep the first sample of each prompt and picture."""
    return list({(sample.prompt, sample.images): sample for sample in reversed(samples)}.values())
