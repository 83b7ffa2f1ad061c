"""The sizes of a diagnosis."""

from dataclasses import dataclass, replace
from typing import Any

from safebridge.errors import DataError, UnknownNameError

__all__ = ["CONDITIONS", "FAST", "SPELLED", "DiagnosisConfig", "choose_config"]

SPELLED = "spelled"
CONDITIONS = ("text", "caption", SPELLED, "picture", "typographic", "blank", "noise")
"""How a request is put. `text`: in words. `caption`: beside a description of its picture, without
the picture. `spelled`: beside the picture, whose tokens are written over with the name of what it
shows; only where pictures become tokens, and only without a defense. `picture`: beside the
picture, which alone shows the thing. `typographic`: as words drawn in a picture. `blank` and
`noise`: in words, beside a picture that shows nothing."""

_SPLITS = ("fit", "validation", "test")


@dataclass(frozen=True)
class DiagnosisConfig:
    """How much is measured.

    The defaults are meant for the embedded model with three defenses on two cores.
    """

    split: str = "validation"
    """Which part of the shipped twins to ask about: fit, validation or test."""

    harmful_samples: int = 48
    """Harmful requests, each put in seven ways."""

    benign_samples: int = 48
    """Harmless requests of the same wording, each put in seven ways."""

    max_new_tokens: int = 16
    """Length at which an answer is cut; a refusal shows in its first words."""

    batch_size: int = 24
    """Requests answered at the same time."""

    defended_conditions: str = "text,picture"
    """Ways of putting a request that are measured with each defense, with commas."""

    layer_samples: int = 40
    """Requests per group for everything about layers; 0 leaves these parts out."""

    sweep_samples: int = 16
    """Harmless requests for the scaling test of the safety layers; 0 leaves it out."""

    sweep_tokens: int = 8
    """First tokens of an answer that the scaling test reads."""

    bootstrap_draws: int = 200
    """Draws of every band of a curve."""

    shown_samples: int = 40
    """Requests that the report shows with their pictures and answers."""

    seed: int = 0
    """Seed of the choice of samples, of noise pictures, of folds and of every bootstrap."""

    def __post_init__(self) -> None:
        """Refuse sizes that leave nothing to measure.

        Raises:
            DataError: If a size is not positive or, where 0 means "none", negative.
            UnknownNameError: If the split or a condition is unknown.
        """
        if self.split not in _SPLITS:
            raise UnknownNameError("split", self.split, _SPLITS)
        for condition in self.conditions_with_defense:
            known = tuple(name for name in CONDITIONS if name != SPELLED)
            if condition not in known:
                raise UnknownNameError("condition", condition, known)
        may_be_zero = {"seed", "layer_samples", "sweep_samples", "shown_samples"}
        for name, value in vars(self).items():
            if isinstance(value, str):
                continue
            if value < 0 or (value == 0 and name not in may_be_zero):
                option = "--" + name.replace("_", "-")
                least = "0 or more" if name in may_be_zero else "above 0"
                raise DataError(f"{option} must be {least}, found {value}.")

    @property
    def conditions_with_defense(self) -> tuple[str, ...]:
        """The conditions that are measured with each defense."""
        return tuple(name.strip() for name in self.defended_conditions.split(",") if name.strip())


FAST = DiagnosisConfig(
    harmful_samples=12,
    benign_samples=12,
    max_new_tokens=12,
    layer_samples=12,
    sweep_samples=0,
    bootstrap_draws=100,
    shown_samples=12,
)
"""The sizes of `--fast`: about a minute on two cores, with wide intervals."""


def choose_config(*, is_fast: bool, given: dict[str, Any]) -> DiagnosisConfig:
    """Return the sizes of a run.

    Args:
        is_fast: Start from `FAST` instead of the defaults.
        given: Fields to change, e.g. from the command line.

    Raises:
        DataError: If a given size leaves nothing to measure.
        UnknownNameError: If the split or a condition is unknown.
    """
    return replace(FAST if is_fast else DiagnosisConfig(), **given)
