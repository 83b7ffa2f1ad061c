"""Settings of a security tensor; the text under each field is its documentation."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, final

from safebridge.artifacts.settings import rebuild_settings
from safebridge.errors import SettingError

__all__ = ["SET_NAMES", "SecurityTensorsConfig"]

SET_NAMES: Final = ("SA", "TCB", "GB")
"""Safety activation (refuse), text-contrast benign and general benign (answer as before)."""

_CHOICES: Final = {
    "modality": ("textual", "visual", "both"),
    "order": ("joint", "textual_first", "visual_first"),
    "position": ("prefix", "after_image"),
    "applies_to": ("all", "pictures"),
    "init": ("embeddings", "random", "text"),
    "benign_loss": ("ce", "kl"),
    "schedule": ("constant", "cosine"),
    "autocast": ("none", "bfloat16"),
}
_AT_LEAST_ONE: Final = ("num_virtual_tokens", "epochs", "batch_size", "accumulation_steps")
_POSITIVE: Final = ("learning_rate", "visual_learning_rate")
_NOT_NEGATIVE: Final = (
    "max_answer_tokens",
    "weight_decay",
    "weight_sa",
    "weight_tcb",
    "weight_gb",
    "max_steps",
    "warmup_steps",
    "patience",
    "max_grad_norm",
    "visual_init_std",
    "visual_side",
    "max_change_pixels_255",
    "kl_top_k",
)
_ADDED: Final = {
    "order": "joint",
    "visual_side": 0,
    "max_change_pixels_255": 0.0,
    "kl_top_k": 0,
    "applies_to": "all",
    "init_text": "",
    "is_gradient_checkpointed": False,
}
"""Settings that artifacts of version 0.1.0 lack, with the values that they were fitted by."""


@final
@dataclass(frozen=True)
class SecurityTensorsConfig:
    """How a security tensor is shaped and fitted.

    Our defaults suit short fits on small models. Where the paper (arXiv:2507.20994)
    or its code has another value, the text names it.

    Raises:
        SettingError: If a value is out of its range.
    """

    modality: str = "textual"
    """Which tensor to fit: "textual" (virtual tokens), "visual" (added to the pixels) or "both".
    The paper fits the two apart and never combines them."""

    order: str = "joint"
    """How "both" are fitted: "joint" (together), or one after the other with the first one kept
    as it is: "textual_first" or "visual_first". Each of the two then takes `epochs`."""

    num_virtual_tokens: int = 32
    """Number of virtual tokens of the textual tensor. Paper: 300 for Llama 3.2 Vision, 100 for
    Qwen-VL and LLaVA-1.5."""

    position: str = "prefix"
    """Where the virtual tokens go: "prefix" (before everything, as in the authors' code) or
    "after_image" (right after the last image token, as in the paper's text)."""

    applies_to: str = "all"
    """Which requests get the virtual tokens: "all", or "pictures" (those with a picture, so that
    requests in text alone are answered exactly as before). The paper speaks of pictures only."""

    init: str = "embeddings"
    """Start of the virtual tokens: "embeddings" (embeddings of tokens drawn from the vocabulary),
    "random" (standard normal, as in the authors' code) or "text" (the tokens of `init_text`)."""

    init_text: str = ""
    """Words whose embeddings are the start with init="text", repeated or cut to the length."""

    learning_rate: float = 5e-3
    """AdamW step size of the textual tensor. Paper: 8e-4."""

    visual_learning_rate: float = 16e-4
    """AdamW step size of the visual tensor. Paper: 16e-4."""

    visual_init_std: float = 0.2
    """Standard deviation of the visual tensor's normal start, in units of preprocessed pixels.
    Authors' code: 0.2."""

    visual_side: int = 0
    """Side in pixels of the visual tensor for models that take pictures of any size (Qwen-VL,
    Pixtral), where it is resampled to each picture; 0 takes the first picture's height and
    width. Other models prescribe the size."""

    max_change_pixels_255: float = 0.0
    """Largest change of a colour value by the visual tensor, in units of pixels from 0 to 255; 0
    sets no bound, as in the authors' released tensors. The paper names a threshold of 1, in units
    that it does not say."""

    weight_decay: float = 0.01
    """Weight decay of AdamW. Authors' code: 0.01 for the textual tensor; plain Adam for the
    visual one, which is weight decay 0."""

    epochs: int = 4
    """Passes over the samples. Paper: 300 to 500."""

    max_steps: int = 0
    """Stop after this many optimiser steps, whatever `epochs` says; 0 sets no limit."""

    batch_size: int = 16
    """Samples in a batch. Paper: 1."""

    accumulation_steps: int = 1
    """Batches whose gradients are summed into one step. Paper: 1."""

    schedule: str = "cosine"
    """Course of the step size: "constant" (as in the paper) or "cosine" (falls to zero)."""

    warmup_steps: int = 0
    """Steps over which the step size rises from zero. Paper: 0."""

    max_grad_norm: float = 1.0
    """Largest gradient norm, longer gradients are scaled down; 0 sets no limit, as in the
    paper."""

    benign_loss: str = "ce"
    """Loss on benign samples: "ce" (cross-entropy on the model's own answer, as in the authors'
    code) or "kl" (forward KL from the undefended model's distribution, as in the paper's text)."""

    kl_top_k: int = 64
    """How many of the undefended model's likeliest tokens are kept for "kl" at each answer token,
    with the probability of all others as one more; computed once for each sample. 0 takes
    the whole vocabulary."""

    max_answer_tokens: int = 0
    """Answer tokens that count in the loss, from the first on; 0 counts all, as in the paper.
    The first words decide whether an answer is a refusal, and the rest is not computed then."""

    weight_sa: float = 1.0
    """Factor of the loss on SA samples (harmful picture, refusal). Paper: 1."""

    weight_tcb: float = 1.0
    """Factor of the loss on TCB samples (same wording, benign picture). Paper: 1."""

    weight_gb: float = 1.0
    """Factor of the loss on GB samples (general benign questions). Paper: 1."""

    autocast: str = "none"
    """Arithmetic of the forward pass: "none" (the model's own type) or "bfloat16". The tensor
    itself is always kept and updated in float32."""

    is_gradient_checkpointed: bool = False
    """Compute every layer twice instead of keeping what the backward pass needs of it: less
    memory, more time. Counts where the whole model runs; see docs/security-tensors.md."""

    patience: int = 0
    """Stop after this many epochs without a better validation score and keep the best tensor; 0
    runs to the end. Needs `validation`. The authors stop by hand."""

    seed: int = 0
    """Seed of the start values and of the order of the batches."""

    def __post_init__(self) -> None:
        """Check every range once, so that nothing below has to."""
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise SettingError(f"{name}={value!r} is unknown. Choose {_listed(choices)}.")
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise SettingError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in _POSITIVE:
            if not getattr(self, name) > 0:
                raise SettingError(f"{name}={getattr(self, name)} must be above 0.")
        for name in _NOT_NEGATIVE:
            if not getattr(self, name) >= 0:
                raise SettingError(f"{name}={getattr(self, name)} must not be negative.")
        if (self.init == "text") != bool(self.init_text.strip()):
            raise SettingError(
                f'init="{self.init}" and init_text={self.init_text!r} do not go together. Give '
                'init_text with init="text", and only then.'
            )

    @property
    def has_text(self) -> bool:
        """Whether virtual tokens are part of it."""
        return self.modality != "visual"

    @property
    def has_visual(self) -> bool:
        """Whether a pixel tensor is part of it."""
        return self.modality != "textual"

    @property
    def set_weights(self) -> dict[str, float]:
        """The factor of each set's loss by set name."""
        return {"SA": self.weight_sa, "TCB": self.weight_tcb, "GB": self.weight_gb}

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SecurityTensorsConfig":
        """Rebuild settings, refusing missing and unknown names.

        Settings that came after version 0.1.0 may be missing.

        Args:
            values: What `to_dict` returned.

        Raises:
            SettingError: If a setting is missing, unknown or out of range.
        """
        return rebuild_settings(cls, {**_ADDED, **values}, "a security tensor")


def _listed(choices: tuple[str, ...]) -> str:
    return " or ".join(f'"{choice}"' for choice in choices)
