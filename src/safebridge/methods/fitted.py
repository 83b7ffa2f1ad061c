"""What every method shares: settings, tensors and origin of a fit, written and read again."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Generic, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from safebridge.artifacts.store import ArtifactMetadata, check_model, load_artifact, save_artifact
from safebridge.models.load import VLM

__all__ = ["FittedMethod", "MethodConfig", "describe_origin"]


@runtime_checkable
class MethodConfig(Protocol):
    """Settings of a method, as its artifact keeps them."""

    @property
    def seed(self) -> int:
        """Seed of the fit."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        ...

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Any:
        """Rebuild settings, refusing what is missing or unknown.

        Args:
            values: What `to_dict` returned.
        """
        ...


ConfigT = TypeVar("ConfigT", bound=MethodConfig)
MethodT = TypeVar("MethodT", bound="FittedMethod[Any]")


class FittedMethod(ABC, Generic[ConfigT]):
    """The part of a method that is the same for all: keeping a fit and finding it again.

    Args:
        config: The settings it was fitted with.
        tensors: What was fitted, by name; what each is, the method says.
        metadata: Model, data and seed it comes from.
    """

    kind: ClassVar[str]
    """Name in the registry and in artifacts."""

    config_class: ClassVar[type[Any]]
    """The method's settings."""

    def __init__(
        self, config: ConfigT, tensors: Mapping[str, Tensor], metadata: ArtifactMetadata
    ) -> None:
        self.config = config
        self.tensors: Mapping[str, Tensor] = MappingProxyType(dict(tensors))
        self.metadata = metadata

    def save(self, folder: Path | str) -> Path:
        """Write an artifact folder whole or not at all.

        Args:
            folder: Where to; an earlier artifact there is replaced.

        Returns:
            The folder.

        Raises:
            ArtifactError: If it cannot be written; what was there is unchanged.
        """
        return save_artifact(
            folder,
            kind=self.kind,
            config=self.config.to_dict(),
            tensors=self.tensors,
            metadata=self.metadata,
        )

    @classmethod
    def load(  # noqa: PYI019 - the checker of shapes knows no Self
        cls: type[MethodT], folder: Path | str, vlm: VLM, *, allow_other_model: bool = False
    ) -> MethodT:
        """Read an artifact folder and check that it belongs to the model.

        Args:
            folder: A folder that `save` wrote.
            vlm: The model it is for.
            allow_other_model: Accept another model of the same sizes on purpose.

        Raises:
            ArtifactError: If the folder is damaged or of another kind.
            ModelMismatchError: If it was fitted on another model.
            ShapeError: If it does not fit the model's sizes.
        """
        artifact = load_artifact(folder, kind=cls.kind)
        config = cls.config_class.from_dict(artifact.config)
        method = cls(config, artifact.tensors, artifact.metadata)
        method._check_tensors(folder)
        if not allow_other_model:
            check_model(folder, artifact.metadata, name=vlm.name, fingerprint=vlm.fingerprint)
        method._check_sizes(vlm)
        return method

    @abstractmethod
    def _check_tensors(self, folder: Path | str) -> None:
        """Refuse tensors that the settings do not ask for, or lack."""

    @abstractmethod
    def _check_sizes(self, vlm: VLM) -> None:
        """Refuse a model that the tensors do not fit."""


def describe_origin(
    vlm: VLM, config: MethodConfig, data_source: str, details: dict[str, Any]
) -> ArtifactMetadata:
    """Return where a fit comes from.

    Args:
        vlm: The model that was fitted on.
        config: The settings.
        data_source: Name of the data.
        details: Anything else worth keeping, as JSON.
    """
    return ArtifactMetadata(
        base_model=vlm.name,
        revision=vlm.revision,
        fingerprint=vlm.fingerprint,
        data_source=data_source,
        seed=config.seed,
        details=details,
    )
