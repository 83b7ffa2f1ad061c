"""Settings of text-guided alignment; the text under each field is its documentation."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, final

from safebridge.artifacts.settings import rebuild_settings
from safebridge.errors import SettingError, ShapeError

__all__ = ["TextGuidedAlignmentConfig", "parse_layers"]

_CHOICES: Final = {
    "form": ("paper", "repository"),
    "reduction": ("mean", "sum"),
    "centre": ("none", "captions"),
    "pooling": ("mean", "last"),
    "retrieved": ("prefix", "text_pass", "none"),
    "teacher": ("current", "base"),
    "trainable": ("projector", "projector+lora", "full"),
    "guide_trains": ("all", "projector"),
    "lora_targets": ("all", "attention"),
    "template": ("chat", "plain"),
    "schedule": ("constant", "cosine"),
    "autocast": ("auto", "none", "bfloat16"),
    "cache_dtype": ("float32", "float16", "bfloat16"),
}
_ADDED: Final = {"guide_trains": "all"}
"""Settings that earlier artifacts lack, with the values that they were fitted by."""
_AT_LEAST_ONE: Final = ("lora_rank", "epochs", "batch_size", "accumulation_steps")
_POSITIVE: Final = ("learning_rate", "lora_alpha", "language_learning_rate")
_NOT_NEGATIVE: Final = (
    "align_weight",
    "pair_weight",
    "answer_weight",
    "weight_decay",
    "max_steps",
    "warmup_steps",
    "max_grad_norm",
    "patience",
)


@final
@dataclass(frozen=True)
class TextGuidedAlignmentConfig:
    """What is trained, with which guide loss, and how.

    Our defaults suit short fits on small models. Where the paper (arXiv:2410.12662), as
    far as it is known, or the authors' repository has another value, the text names it.

    Raises:
        SettingError: If a value is out of its range, or two do not go together.
    """

    trainable: str = "projector"
    """What is trained: "projector" (stage 1), "projector+lora" (low-rank adapters on the language
    model besides) or "full" (projector and language model, the repository's stage 2)."""

    form: str = "paper"
    """Form of the guide loss: "paper" (-cos and softplus) or "repository" (exponentials with
    weights 0.25 and 0.1 that fall to zero over the run)."""

    layers: str = "all"
    """Decoder layers whose states are aligned: "all" (paper), numbers and ranges from 0 such as
    "9-17" (repository, of 32 layers) or "3,5,7", or a relative depth such as "0.28-0.56"."""

    reduction: str = "mean"
    """How the layers are put together: "mean" (repository) or "sum" (paper)."""

    centre: str = "none"
    """What is subtracted from all states before they are compared: "none" (paper, repository) or
    the mean of the batch's "captions", because in most models a few features that all states share
    decide the cosine. Wants batches of ten captions or more."""

    align_weight: float = 1.0
    """Factor of the term that draws a picture's states to its caption's; 0 leaves it out."""

    pair_weight: float = 1.0
    """Factor of the term that keeps a picture closer to its caption than the retrieved text is;
    0 leaves it out."""

    answer_weight: float = 1.0
    """Factor of the cross-entropy on the answers; 0 leaves the guide loss alone."""

    is_guide_detached: bool = False
    """Keep the guide loss from having a gradient, as the authors' released code does by accident;
    a control, not for use."""

    guide_trains: str = "all"
    """What the guide loss moves: "all" that is trained (paper, repository) or the "projector"
    alone, while adapters or language model learn from the answers and nothing else. Costs another
    backward pass."""

    is_retrieved_detached: bool = True
    """Keep the gradient of the pair term out of the retrieved text's states. Repository: no."""

    pooling: str = "mean"
    """How the states of a span become one: "mean" (paper, repository) or "last" token."""

    retrieved: str = "prefix"
    """Where the retrieved text is read: "prefix" (before the picture in the prompt, as in the
    repository), "text_pass" (alone, like the caption; the prompt stays as it is) or "none"."""

    retrieved_format: str = "Retrieved Text: {}. "
    """How a prefix is written, with {} at the text's place. Repository: this."""

    teacher: str = "current"
    """Which weights read the captions: "current" (as they are at that step, as in the repository)
    or "base" (as they were before the fit). The same where the language model is frozen."""

    template: str = "chat"
    """How a sample is written: "chat" (the model's own template) or "plain" (the picture and then
    the answer without any template or question, the repository's stage 1)."""

    lora_rank: int = 16
    """Rank of the adapters. Repository: 128 as a default that its scripts do not use."""

    lora_alpha: float = 32.0
    """The adapters' product counts alpha / rank times."""

    lora_targets: str = "all"
    """Linear layers of the decoder that get adapters: "all" or those of the "attention"."""

    learning_rate: float = 1e-3
    """AdamW step size of the projector. Repository: 1e-3 in stage 1, 2e-6 in stage 2."""

    language_learning_rate: float = 2e-4
    """AdamW step size of adapters or language model. Repository: 2e-6 (full, stage 2)."""

    weight_decay: float = 0.0
    """Weight decay of AdamW. Repository: 0."""

    epochs: int = 1
    """Passes over the samples. Repository: 1."""

    max_steps: int = 0
    """Stop after this many optimiser steps, whatever `epochs` says; 0 sets no limit."""

    batch_size: int = 16
    """Samples in a batch. Repository: 32 per device in stage 1, 4 in stage 2."""

    accumulation_steps: int = 1
    """Batches whose gradients are summed into one step. Repository: 1."""

    schedule: str = "cosine"
    """Course of the step size: "constant" or "cosine" (to zero, as in the repository)."""

    warmup_steps: int = 0
    """Steps over which the step size rises from zero. Repository: 3 % of all steps."""

    max_grad_norm: float = 1.0
    """Largest gradient norm, longer gradients are scaled down; 0 sets no limit."""

    has_gradient_checkpointing: bool = False
    """Compute the decoder's layers again in the backward pass instead of keeping what is in them.
    Repository: yes."""

    autocast: str = "auto"
    """Arithmetic of the forward pass: "none" (the model's own type), "bfloat16", or "auto", which
    takes bfloat16 if the model is in half precision. Under bfloat16, trained weights are kept and
    updated in float32."""

    cache_dtype: str = "float32"
    """Type in which the text states are kept."""

    patience: int = 0
    """Stop after this many epochs without a better validation score and keep the best weights; 0
    runs to the end. Needs `validation`."""

    seed: int = 0
    """Seed of the adapters' start and of the order of the batches."""

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
        self._check_pairs()

    def _check_pairs(self) -> None:
        """Check what has to go together."""
        if "{}" not in self.retrieved_format:
            raise SettingError("retrieved_format needs {} where the retrieved text goes.")
        if self.pair_weight and self.retrieved == "none":
            raise SettingError(
                'the pair term needs a retrieved text. Use pair_weight=0, or retrieved="prefix" or '
                '"text_pass".'
            )
        if not self.answer_weight and (self.is_guide_detached or not self.has_guide):
            raise SettingError(
                "neither the answers nor the guide loss have a gradient, so nothing would be "
                "learnt. Raise answer_weight, or use the guide loss undetached."
            )

        if not self.answer_weight and self.is_guide_apart:
            raise SettingError(
                f'guide_trains="projector" with answer_weight=0 leaves "{self.trainable}" without '
                'anything to learn beyond the projector. Use trainable="projector", or raise '
                "answer_weight."
            )

    @property
    def has_guide(self) -> bool:
        """Whether a guide term is computed."""
        return bool(self.align_weight or self.pair_weight)

    @property
    def has_pair(self) -> bool:
        """Whether the states of the retrieved text are needed."""
        return self.pair_weight > 0

    @property
    def is_language_model_trained(self) -> bool:
        """Whether anything after the projector changes during the fit."""
        return self.trainable != "projector"

    @property
    def is_guide_apart(self) -> bool:
        """Whether the guide loss takes a backward pass of its own."""
        is_narrow = self.guide_trains == "projector" and self.is_language_model_trained
        return is_narrow and self.has_guide and not self.is_guide_detached

    @property
    def is_text_state_constant(self) -> bool:
        """Whether the states of a caption are the same at every step, so that they can be kept."""
        return self.teacher == "base" or not self.is_language_model_trained

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TextGuidedAlignmentConfig":
        """Rebuild settings, refusing missing and unknown names.

        Settings that came later than the artifact may be missing.

        Args:
            values: What `to_dict` returned.

        Raises:
            SettingError: If a setting is missing, unknown or out of range.
        """
        return rebuild_settings(cls, {**_ADDED, **values}, "text-guided alignment")


def parse_layers(text: str, num_layers: int) -> tuple[int, ...]:
    """Return the decoder layers that a setting names, counted from 0.

    A relative depth `a-b` takes the layers from `round(a * n)` to `round(b * n) - 1`, at
    least one; "0.28-0.56" is the repository's choice for any depth: of 32 layers it takes
    10 to 18 counted from 1, which are 9 to 17 here.

    Args:
        text: "all", numbers and ranges such as "3,5,9-17", or a relative depth.
        num_layers: Number of decoder layers.

    Raises:
        SettingError: If the text is none of these.
        ShapeError: If the model has no such layer.
    """
    if text == "all":
        return tuple(range(num_layers))
    try:
        layers = _read_layers(text, num_layers)
    except ValueError as error:
        raise SettingError(
            f'layers="{text}" cannot be read. Write "all", numbers and ranges such as "3,5,9-17", '
            'or a relative depth such as "0.28-0.56".'
        ) from error
    beyond = [layer for layer in layers if layer >= num_layers]
    if beyond or not layers:
        raise ShapeError(
            f'layers="{text}" names {f"layer {beyond[0]}" if beyond else "no layer"}, but this '
            f"model has the layers 0 to {num_layers - 1}. Name some of these."
        )
    return tuple(sorted(set(layers)))


def _read_layers(text: str, num_layers: int) -> list[int]:
    if "." in text:
        low, high = (float(part) for part in text.split("-"))
        if not 0 <= low < high <= 1:
            raise ValueError(text)
        first = min(round(low * num_layers), num_layers - 1)
        return list(range(first, max(first + 1, round(high * num_layers))))
    layers: list[int] = []
    for part in text.split(","):
        first_text, dash, last_text = part.strip().partition("-")
        layers += range(int(first_text), int(last_text if dash else first_text) + 1)
    return layers


def _listed(choices: tuple[str, ...]) -> str:
    return " or ".join(f'"{choice}"' for choice in choices)
