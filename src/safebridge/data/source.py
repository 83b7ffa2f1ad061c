"""What offers text and picture twins: the shipped ones, or anything of the same shape."""

from typing import Protocol, runtime_checkable

from safebridge.data.sample import Sample
from safebridge.data.tables import Split

__all__ = ["TwinSource"]


@runtime_checkable
class TwinSource(Protocol):
    """Text and picture twins; the module `safebridge.data.twins` is one."""

    def load_samples(
        self,
        kind: str,
        split: Split,
        *,
        limit: int | None = None,
        seed: int = 0,
        categories: str = "all",
    ) -> list[Sample]:
        """Return samples of one kind and split, drawn with a seed."""
        ...

    def names_of(self, concept: str) -> tuple[str, ...]:
        """Return every name that counts as naming a concept."""
        ...

    def is_seen(self, category: str) -> bool:
        """Return whether a defense may be fitted on a category."""
        ...

    def manifest_sha256(self) -> str:
        """Return the SHA-256 of everything the samples are made of."""
        ...
