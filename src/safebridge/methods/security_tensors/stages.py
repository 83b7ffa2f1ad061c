"""Which parts of a security tensor are fitted, and in which order."""

from dataclasses import dataclass
from typing import final

from safebridge.methods.security_tensors.config import SecurityTensorsConfig

__all__ = ["Stage", "plan_stages"]


@final
@dataclass(frozen=True)
class Stage:
    """One run of the training loop."""

    present: tuple[str, ...]
    """The parts that are applied: "tokens" and/or "pixels"."""

    trained: tuple[str, ...]
    """The parts that are trained; the other present ones stay as they are."""


def plan_stages(config: SecurityTensorsConfig) -> tuple[Stage, ...]:
    """Return the stages of a fit.

    Args:
        config: Its modality and order.
    """
    parts = (*(["tokens"] if config.has_text else []), *(["pixels"] if config.has_visual else []))
    if len(parts) == 1 or config.order == "joint":
        return (Stage(parts, parts),)
    first, second = parts if config.order == "textual_first" else reversed(parts)
    return (Stage((first,), (first,)), Stage(parts, (second,)))
