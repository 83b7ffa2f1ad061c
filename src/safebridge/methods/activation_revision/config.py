"""Settings of an activation revision; the text under each field is its documentation."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, final

from safebridge.artifacts.settings import rebuild_settings
from safebridge.errors import SettingError

__all__ = ["ActivationRevisionConfig"]

_CHOICES: Final = {
    "level": ("head", "layer"),
    "site": ("resid_out", "attn_out", "mlp_out", "resid_in"),
    "vector": ("mms", "probe", "pca"),
    "read_position": ("auto", "last_prompt_token", "last_response_token", "mean_response"),
    "scale": ("auto", "sigma", "mean_difference", "activation_norm", "one"),
    "scope": ("last_and_decode", "decode_only", "all", "prompt", "image", "text", "last_k"),
    "norm_guard": ("none", "keep"),
    "gate": ("none", "cosine", "probe"),
    "selection": ("probe", "random"),
    "direction": ("fitted", "opposite", "random"),
}
_AT_LEAST_ONE: Final = ("scope_tokens", "batch_size")
_NOT_NEGATIVE: Final = ("top_k", "alpha")
_FRACTIONS: Final = ("validation_ratio", "gate_false_alarm_rate")
_SHARE_OF_HEADS: Final = 48 / 1024  # ITI's K of LLaMA-7B's heads
_SHARE_OF_LAYERS: Final = 1 / 4


@final
@dataclass(frozen=True)
class ActivationRevisionConfig:
    """How an activation revision is fitted, chosen and applied.

    The text of the paper (arXiv:2501.16378) was not at hand; what is known of it is that there
    are two levels, three ways to build samples and two ways to a vector. The defaults are ITI's
    (arXiv:2306.03341), whose recipe the paper's terms follow, or ours; none is presented as the
    paper's.

    Raises:
        SettingError: If a value is out of its range.
    """

    level: str = "head"
    """What is revised: "head" (outputs of attention heads, before the output projection) or
    "layer" (the residual stream or a block's output)."""

    site: str = "resid_out"
    """Where a layer is revised: "resid_out" (output of the decoder layer), "attn_out" (output of
    the attention's projection), "mlp_out" or "resid_in". Not used at head level."""

    vector: str = "mms"
    """The direction: "mms" (mass mean shift, the difference of the class means), "probe" (weight
    of the logistic probe) or "pca" (first principal component of group-centred activations)."""

    read_position: str = "auto"
    """Where activations are read: "last_response_token", "mean_response", "last_prompt_token", or
    "auto", which is the last response token of samples with answers and the last prompt token of
    samples without."""

    top_k: int = 0
    """How many heads or layers are revised, best first; 0 takes 48 of 1024 heads as ITI does,
    scaled to the model, or a quarter of the layers."""

    layers: str = ""
    """Decoder layers to choose from, e.g. "8-15" or "4,6,-1"; empty is all."""

    alpha: float = 0.0
    """Strength in units of `scale`; 0 takes 15 (ITI) with sigma, else 1."""

    scale: str = "auto"
    """Unit of the strength: "sigma" (spread of the activations along the direction, as in ITI),
    "mean_difference" (distance of the class means), "activation_norm" (mean length of the
    activations), "one", or "auto": sigma at head level, mean_difference at layer level."""

    scope: str = "last_and_decode"
    """Tokens that are revised: "last_and_decode" (last prompt token and every generated one, as
    in ITI), "decode_only", "all" (can be folded into weights), "prompt", "image", "text" (all
    but image tokens) or "last_k" (the prompt's last tokens alone)."""

    scope_tokens: int = 1
    """How many tokens at the prompt's end "last_and_decode" and "last_k" take."""

    norm_guard: str = "none"
    """What happens to an activation's length: "none" or "keep" (it gets its old length back)."""

    gate: str = "none"
    """Condition on the prompt: "none" (revise always), "cosine" or "probe" (revise the samples
    whose prompt state looks harmful). Needs benign samples to fit."""

    gate_layer: int = -1
    """Decoder layer that the gate reads, from 0; -1 takes the one whose probe best tells
    harmful from benign prompts about things that it was not fitted on."""

    gate_false_alarm_rate: float = 0.02
    """Share of benign prompts that may open the gate, in (0, 1)."""

    selection: str = "probe"
    """How sites are chosen: "probe" (held-out accuracy) or "random" (a control)."""

    direction: str = "fitted"
    """Which way to revise: "fitted", "opposite" (a control) or "random" (a control of equal
    length)."""

    inverse_regularisation: float = 1.0
    """Inverse L2 strength C of the probes. ITI: 1."""

    validation_ratio: float = 0.2
    """Share of the groups that probes are ranked on. ITI: 0.2."""

    batch_size: int = 16
    """Samples in one forward pass of the capture."""

    seed: int = 0
    """Seed of the split, of random sites and of random directions."""

    def __post_init__(self) -> None:
        """Check every range once, so that nothing below has to."""
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                listed = " or ".join(f'"{choice}"' for choice in choices)
                raise SettingError(f"{name}={value!r} is unknown. Choose {listed}.")
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise SettingError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in _NOT_NEGATIVE:
            if not getattr(self, name) >= 0:
                raise SettingError(f"{name}={getattr(self, name)} must not be negative.")
        for name in _FRACTIONS:
            if not 0 < getattr(self, name) < 1:
                raise SettingError(f"{name}={getattr(self, name)} must be between 0 and 1.")
        if not self.inverse_regularisation > 0:
            raise SettingError(
                f"inverse_regularisation={self.inverse_regularisation} must be above 0."
            )
        self.parse_layers(num_layers=1_000_000)

    @property
    def place(self) -> str:
        """The place of a decoder layer that is read and revised."""
        return "heads" if self.level == "head" else self.site

    @property
    def unit(self) -> str:
        """The unit of the strength, "auto" resolved."""
        if self.scale != "auto":
            return self.scale
        return "sigma" if self.level == "head" else "mean_difference"

    @property
    def factor(self) -> float:
        """The strength in units of `unit`, 0 resolved."""
        return self.alpha or (15.0 if self.unit == "sigma" else 1.0)

    def count_sites(self, candidates: int) -> int:
        """Return how many of a number of heads or layers are revised.

        Args:
            candidates: Heads or layers to choose from.
        """
        share = _SHARE_OF_HEADS if self.level == "head" else _SHARE_OF_LAYERS
        return min(candidates, self.top_k or max(1, round(share * candidates)))

    def parse_layers(self, num_layers: int) -> tuple[int, ...] | None:
        """Return the layers that `layers` names, counted from 0; None if it names none.

        Args:
            num_layers: Decoder layers of the model; numbers below 0 count back from there.

        Raises:
            SettingError: If the text cannot be read, or there is no such layer.
        """
        if not self.layers.strip():
            return None
        found: set[int] = set()
        for part in self.layers.split(","):
            first, dash, last = part.strip().rpartition("-")
            try:
                is_range = bool(dash and first)
                low = int(first) if is_range else int(part)
                high = int(last) if is_range else low
            except ValueError as error:
                raise SettingError(
                    f'layers={self.layers!r} cannot be read. Write e.g. "8-15" or "4,6,-1".'
                ) from error
            found |= {layer + num_layers if layer < 0 else layer for layer in range(low, high + 1)}
        wrong = sorted(layer for layer in found if not 0 <= layer < num_layers)
        if wrong or not found:
            raise SettingError(
                f"layers={self.layers!r} names layers that are not there: the model has "
                f"{num_layers}, from 0 to {num_layers - 1}."
            )
        return tuple(sorted(found))

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ActivationRevisionConfig":
        """Rebuild settings, refusing missing and unknown names.

        Args:
            values: What `to_dict` returned.

        Raises:
            SettingError: If a setting is missing, unknown or out of range.
        """
        return rebuild_settings(cls, values, "an activation revision")
