"""What every method offers: fit, apply, save and load."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from safebridge.data.sample import Sample
from safebridge.models.load import VLM

__all__ = ["Method"]


@runtime_checkable
class Method(Protocol):
    """A defense that was fitted on one model and can be put into it and taken out again."""

    @classmethod
    def fit(cls, vlm: VLM, samples: Sequence[Sample], config: Any) -> "Method":
        """Learn the defense; the model and the samples stay as they were.

        Args:
            vlm: The model to defend.
            samples: What to learn from.
            config: The method's own frozen dataclass.
        """
        ...

    def apply(self, vlm: VLM, *, strength: float = 1.0) -> AbstractContextManager[None]:
        """Defend `vlm.model(...)` and `vlm.model.generate(...)` inside a `with` block.

        Args:
            vlm: The model to defend; given back bit for bit, also on an error.
            strength: 1 is as fitted, 0 is the undefended model.
        """
        ...

    def save(self, folder: Path | str) -> Path:
        """Write an artifact folder whole or not at all.

        Args:
            folder: Where to; an earlier artifact there is replaced.
        """
        ...

    @classmethod
    def load(cls, folder: Path | str, vlm: VLM, *, allow_other_model: bool = False) -> "Method":
        """Read an artifact folder and check that it belongs to the model.

        Args:
            folder: A folder that `save` wrote.
            vlm: The model it is for.
            allow_other_model: Accept another model of the same sizes on purpose.
        """
        ...
