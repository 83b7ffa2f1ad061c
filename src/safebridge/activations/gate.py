"""A condition on the prompt: revise the samples whose state looks harmful, leave the others."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from safebridge.activations.probes import Probes, fit_probes
from safebridge.activations.sites import hook_place
from safebridge.errors import DataError, SettingError, ShapeError
from safebridge.models.hooks import preliminary_pass
from safebridge.models.load import VLM

__all__ = ["GATE_KINDS", "Gate", "choose_threshold", "fit_gate", "fit_scaled_probes", "read_gate"]

GATE_KINDS: Final = ("cosine", "probe")
"""`cosine`: of the centred state with the mean difference of harmful and harmless prompts.
`probe`: logit of a logistic probe on standardised states."""

PROBE_REGULARISATION: Final = 0.01
"""Inverse L2 strength of the gate's probe. Ours, chosen on the embedded model's validation split:
a prompt's state has as many features as there are prompts, and 1 fits them by heart."""

_NOT_FOR_A_PROMPT: Final = ("past_key_values", "use_cache", "labels", "logits_to_keep")


@final
@dataclass(frozen=True, eq=False)
class Gate:
    """A score of a prompt's last residual state, and the value from which the gate is open."""

    kind: str
    """One of `GATE_KINDS`."""

    layer: int
    """Decoder layer whose output is read, from 0."""

    weight: Float[Tensor, " hidden"]
    """Direction of harmful prompts, float32."""

    center: Float[Tensor, " hidden"]
    """Subtracted first."""

    bias: float
    """Added to the score of a probe; 0 for the cosine."""

    threshold: float
    """The gate is open from this score on."""

    def score(self, states: Float[Tensor, "n hidden"]) -> Float[Tensor, " n"]:
        """Score prompt states; higher looks more harmful.

        Args:
            states: Residual stream after `layer` at the last prompt token.

        Raises:
            ShapeError: If the states have another width.
        """
        if states.shape[-1] != self.weight.shape[-1]:
            raise ShapeError(
                f"the gate reads {self.weight.shape[-1]} features, found {states.shape[-1]}. Load "
                "the model that it was fitted on, or fit again."
            )
        centred = states.float() - self.center.to(states.device)
        weight = self.weight.to(states.device)
        if self.kind == "cosine":
            return torch.nn.functional.cosine_similarity(centred, weight[None], dim=-1)
        return centred @ weight + self.bias

    def is_open(self, states: Float[Tensor, "n hidden"]) -> Bool[Tensor, " n"]:
        """Say for each prompt state whether to revise.

        Args:
            states: As in `score`.
        """
        return self.score(states) >= self.threshold


def fit_gate(
    harmful: Float[Tensor, "n hidden"],
    harmless: Float[Tensor, "m hidden"],
    *,
    kind: str,
    layer: int,
    false_alarm_rate: float,
    held_out: Float[Tensor, "k hidden"] | None = None,
) -> Gate:
    """Fit a gate to prompt states.

    Args:
        harmful: States of prompts that the revision is meant for.
        harmless: States of prompts that it should leave alone.
        kind: One of `GATE_KINDS`.
        layer: The layer that the states come from.
        false_alarm_rate: Share of harmless prompts that may open the gate, in (0, 1).
        held_out: States of other harmless prompts for the threshold; None uses `harmless`,
            which promises more than it holds.

    Returns:
        The gate.

    Raises:
        DataError: If there are no states of one kind.
        SettingError: If the kind is unknown or the rate out of range.
    """
    if kind not in GATE_KINDS:
        raise SettingError(f"gate={kind!r} is unknown. Choose {' or '.join(GATE_KINDS)}.")
    if not len(harmful) or not len(harmless):
        raise DataError(
            f"a gate needs harmful and harmless prompts, found {len(harmful)} and "
            f"{len(harmless)}. Pass benign=... samples to fit."
        )
    bias = 0.0
    if kind == "cosine":
        weight = harmful.mean(dim=0) - harmless.mean(dim=0)
        center = (harmful.mean(dim=0) + harmless.mean(dim=0)) / 2
    else:
        probes, means = fit_scaled_probes(harmful[:, None], harmless[:, None])
        weight, center, bias = probes.weight[0], means[0], float(probes.bias[0])
    gate = Gate(kind, layer, weight.float(), center.float(), bias, math.inf)
    threshold = choose_threshold(
        gate.score(harmless if held_out is None else held_out), false_alarm_rate
    )
    return Gate(kind, layer, gate.weight, gate.center, bias, threshold)


def fit_scaled_probes(
    harmful: Float[Tensor, "n sites hidden"], harmless: Float[Tensor, "m sites hidden"]
) -> tuple[Probes, Float[Tensor, "sites hidden"]]:
    """Fit one probe for each site on standardised states.

    Args:
        harmful: States of harmful prompts.
        harmless: States of harmless ones.

    Returns:
        Probes of states as they are, less the means; and the means.

    Raises:
        DataError: If there are no states of one kind.
    """
    states = torch.cat([harmful, harmless]).float()
    means, spread = states.mean(dim=0), states.std(dim=0)
    spread = torch.where(spread > 0, spread, 1.0)
    labels = torch.arange(len(states), device=states.device) < len(harmful)
    probes = fit_probes(
        (states - means) / spread, labels, inverse_regularisation=PROBE_REGULARISATION
    )
    return Probes(probes.weight / spread, probes.bias), means


def choose_threshold(scores: Float[Tensor, " n"], false_alarm_rate: float) -> float:
    """Return the lowest threshold that keeps the rate of false alarms on prompts to come.

    A new harmless prompt, drawn like these n, scores at or above it with a probability of at
    most the rate (split-conformal argument). That takes n of at least 1 / rate - 1; with fewer
    the threshold is just above the highest score, and the promise is 1 / (n + 1).

    Args:
        scores: Scores of harmless prompts.
        false_alarm_rate: The rate, in (0, 1).

    Raises:
        DataError: If there are no scores.
        SettingError: If the rate is not in (0, 1).
    """
    if not 0 < false_alarm_rate < 1:
        raise SettingError(f"gate_false_alarm_rate={false_alarm_rate} must be between 0 and 1.")
    if not len(scores):
        raise DataError("no harmless prompts to choose a threshold on. Pass more of them.")
    allowed = max(0, math.floor(false_alarm_rate * (len(scores) + 1)) - 1)
    value = scores.float().sort(descending=True).values[allowed]
    return float(torch.nextafter(value, torch.tensor(math.inf, device=value.device)))


def read_gate(
    vlm: VLM,
    gate: Gate,
    forward: Callable[..., Any],
    inputs: Mapping[str, Any],
    is_prompt: Bool[Tensor, "batch seq"],
) -> Bool[Tensor, " batch"]:
    """Run a prompt up to the gate's layer and decide for each row.

    Args:
        vlm: The model.
        gate: The condition.
        forward: The model's `forward` without the revision.
        inputs: Arguments of `forward` or `generate`.
        is_prompt: True at the prompt's own tokens.
    """
    names = set(inspect.signature(forward).parameters) - set(_NOT_FOR_A_PROMPT)
    own = {name: value for name, value in inputs.items() if name in names}
    for name in list(own):
        if name.startswith(("output_", "return_")):
            del own[name]

    def stop(hidden: Tensor) -> None:
        raise _GateReachedError(hidden)

    handle = hook_place(vlm, "resid_out", gate.layer, stop)
    try:
        with torch.no_grad(), preliminary_pass():
            forward(**own, use_cache=False)
    except _GateReachedError as reached:
        hidden = reached.hidden
    finally:
        handle.remove()
    columns = torch.arange(1, is_prompt.shape[1] + 1, device=is_prompt.device)
    last = (is_prompt * columns).amax(dim=1) - 1
    rows = torch.arange(len(last), device=hidden.device)
    return gate.is_open(hidden[rows, last.to(hidden.device)])


class _GateReachedError(Exception):
    """Stops a forward pass at the gate's layer and carries its output out."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden
