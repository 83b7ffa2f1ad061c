"""The sizes of the demo."""

from dataclasses import dataclass, replace
from typing import Any

from safebridge.errors import DataError

__all__ = ["FAST", "POSITIONS", "DemoConfig", "choose_config"]

POSITIONS = ("prefix", "after_image")
"""Where the security tensor's tokens can go."""


@dataclass(frozen=True)
class DemoConfig:
    """How much the demo measures and fits; the defaults take under ten minutes on two cores."""

    seed: int = 0
    """Seed of the choice of samples, of the fit and of the bootstrap."""

    harmful_samples: int = 100
    """Harmful requests measured as text, and as many as pictures, in the seen categories and
    again in the unseen ones."""

    benign_samples: int = 100
    """Harmless requests measured as text, and as many as pictures."""

    naming_samples: int = 100
    """Pictures whose content the model is asked to name."""

    max_new_tokens: int = 16
    """Length at which a measured answer is cut; a refusal shows in its first words."""

    naming_tokens: int = 12
    """Length at which the name of a thing is cut."""

    batch_size: int = 50
    """Requests answered at the same time while measuring."""

    fit_harmful: int = 480
    """Harmful picture requests in the fit, each with a refusal as its answer (the set SA)."""

    fit_twins: int = 480
    """Harmless picture requests of the same wording, with the model's own answers (TCB)."""

    fit_general: int = 100
    """General picture requests, with the model's own answers (GB)."""

    fit_twin_weight: float = 3.0
    """Weight of the harmless twins in the fit's loss, beside 1 of the harmful ones; more of it
    costs refusals and saves false ones. Raised from 1 because of 23 % false refusals, which a
    test run showed first and the validation split then confirmed."""

    fit_texts: int = 32
    """Harmful requests in text; the model's own most frequent refusal of them is what SA learns."""

    fit_answer_tokens: int = 4
    """First tokens of each answer that the fit learns from; they decide whether it refuses."""

    virtual_tokens: int = 8
    """Length of the security tensor in tokens."""

    position: str = "after_image"
    """Where the virtual tokens go: "after_image" or "prefix"."""

    epochs: int = 4
    """Passes over the samples of the fit, as many as ten minutes leave room for."""

    fit_batch_size: int = 16
    """Samples in one step of the fit."""

    learning_rate: float = 3e-2
    """Step size of the fit."""

    layer_samples: int = 32
    """Requests per group for the layer curves; 0 leaves the curves out."""

    harmful_examples: int = 8
    """Harmful requests shown in the report with both answers."""

    benign_examples: int = 4
    """Harmless requests shown in the report with both answers."""

    def __post_init__(self) -> None:
        """Refuse sizes that leave nothing to measure.

        Raises:
            DataError: If a size is not positive or, where 0 means "none", negative, or the
                position is unknown.
        """
        if self.position not in POSITIONS:
            raise DataError(
                f"--position must be one of {', '.join(POSITIONS)}, found '{self.position}'."
            )
        may_be_zero = {"seed", "layer_samples", "harmful_examples", "benign_examples"}
        for name, value in vars(self).items():
            if name == "position":
                continue
            is_good = value >= 0 if name in may_be_zero else value > 0
            if not is_good:
                option = "--" + name.replace("_", "-")
                least = "0 or more" if name in may_be_zero else "above 0"
                raise DataError(f"{option} must be {least}, found {value}.")


FAST = DemoConfig(
    harmful_samples=20,
    benign_samples=24,
    naming_samples=24,
    fit_harmful=96,
    fit_twins=96,
    fit_general=24,
    layer_samples=12,
    harmful_examples=4,
    benign_examples=2,
)
"""The sizes of `--fast`: under three minutes on two cores, with wide intervals."""


def choose_config(*, is_fast: bool, given: dict[str, Any]) -> DemoConfig:
    """Return the sizes of a run.

    Args:
        is_fast: Start from `FAST` instead of the defaults.
        given: Fields to change, e.g. from the command line.

    Raises:
        DataError: If a given size leaves nothing to measure.
    """
    return replace(FAST if is_fast else DemoConfig(), **given)
