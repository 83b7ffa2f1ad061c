"""The method itself: fit an activation revision, choose, apply, save and load it."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, final

import torch
from jaxtyping import Int
from torch import Tensor

from safebridge.activations.capture import Activations, capture_activations, choose_layers
from safebridge.activations.gate import Gate, choose_threshold
from safebridge.activations.revision import Edit, apply_edits
from safebridge.activations.scopes import TokenScope
from safebridge.activations.sites import place_shape
from safebridge.activations.store import capture_to_disk
from safebridge.data.sample import Sample
from safebridge.errors import ArtifactError, DataError, SettingError, ShapeError
from safebridge.methods.activation_revision.condition import GATE_TENSORS, fit_condition
from safebridge.methods.activation_revision.config import ActivationRevisionConfig
from safebridge.methods.activation_revision.modules import (
    SITE_TENSORS,
    build_shifts,
    choose_sites,
    fit_sites,
)
from safebridge.methods.activation_revision.samples import SAFE, check_groups, group_of
from safebridge.methods.fitted import FittedMethod, describe_origin
from safebridge.models.load import VLM

__all__ = ["CONTROLS", "ActivationRevision"]

CONTROLS: Final = {
    "random-sites": {"selection": "random"},
    "random-direction": {"direction": "random"},
    "opposite": {"direction": "opposite"},
}
"""Settings that should not work, by name: as many sites drawn at random, a random direction of
the same length, the fitted one with the other sign."""

_FITTED: Final = (
    "level",
    "site",
    "vector",
    "read_position",
    "inverse_regularisation",
    "validation_ratio",
    "gate_layer",
)


@final
class ActivationRevision(FittedMethod[ActivationRevisionConfig]):
    """A fitted revision: a direction for every head or layer, and which of them are revised.

    Args:
        config: The settings it was fitted with.
        tensors: What was fitted, see `modules.SITE_TENSORS` and `condition.GATE_TENSORS`.
        metadata: Model, data and seed it comes from.

    Source:
        Li et al. 2025, "Internal Activation Revision" (arXiv:2501.16378), and Li et al. 2023,
        "Inference-Time Intervention" (arXiv:2306.03341). docs/activation-revision.md lists what
        is whose.
    """

    kind = "activation-revision"
    config_class = ActivationRevisionConfig

    @classmethod
    def fit(
        cls,
        vlm: VLM,
        samples: Sequence[Sample],
        config: ActivationRevisionConfig | None = None,
        *,
        harmful: Sequence[Sample] = (),
        benign: Sequence[Sample] = (),
        reference: Sequence[Sample] = (),
        captured: Activations | None = None,
        cache: Path | None = None,
        progress: Callable[[int], object] | None = None,
        data_source: str = "",
    ) -> "ActivationRevision":
        """Learn a revision from contrastive groups; model and samples stay as they were.

        Args:
            vlm: The model to defend.
            samples: Groups of safe and unsafe samples, see `samples.build_multi_response` and
                its neighbours.
            config: The settings; None takes the defaults.
            harmful: Harmful requests for the gate, besides those of the groups. A gate wants
                hundreds: how many harmless requests it spares is decided here.
            benign: Harmless requests, for the gate; with the wordings of the harmful ones, so
                that the wording does not decide.
            reference: Samples whose activations make the unit sigma; none takes `samples`.
            captured: Activations of `samples`, captured before at the same place and position.
            cache: Folder that the activations are written to and resumed from; needed when they
                are many.
            progress: Called with the number of samples captured.
            data_source: Name of the data for the artifact.

        Returns:
            The fitted revision.

        Raises:
            DataError: If the groups are not contrastive, answers are missing, or a gate has no
                benign samples.
            SettingError: If settings do not go together, or there is no gate for `harmful`.
        """
        config = config or ActivationRevisionConfig()
        if harmful and config.gate == "none":
            raise SettingError(
                "harmful=... requests are for a gate, and there is none. Set gate=... or leave "
                "them out."
            )
        samples = check_groups(samples)
        position = _read_position(samples, config)
        layers = choose_layers(vlm, [*samples, *reference], None)
        if captured is None:
            states = _capture(vlm, samples, config, layers, position, cache, progress)
        else:
            states = _check_captured(captured, samples, config.place, layers)
        bank = None
        if reference:
            has_answers = all(sample.answer for sample in reference)
            where = position if has_answers else "last_prompt_token"
            bank = _capture(vlm, reference, config, layers, where, None, progress)
        labels = torch.tensor([sample.set_name == SAFE for sample in samples])
        groups = [group_of(sample) for sample in samples]
        tensors = fit_sites(states, labels, groups, config, bank)
        tensors |= _number_sites(vlm, config.place, layers)
        details = _details(vlm, samples, position)
        if config.gate != "none":
            folder = None if cache is None else cache / "gate"
            found, details["gate"] = fit_condition(
                vlm, samples, config, harmful=harmful, benign=benign, cache=folder
            )
            tensors |= found
        source = data_source or f"{len(samples)} samples"
        return cls(config, tensors, describe_origin(vlm, config, source, details))

    def select(self, **changes: Any) -> "ActivationRevision":
        """Return a copy that revises other sites, or otherwise; nothing is fitted again.

        Args:
            **changes: Fields of the config, e.g. `top_k=16, alpha=8.0, layers="8-15"`.

        Raises:
            SettingError: If a field decides about the fit, or a gate was not fitted.
        """
        fixed = sorted(set(changes) & set(_FITTED))
        if fixed:
            raise SettingError(f"{', '.join(fixed)} decide about the fit. Fit again with them.")
        config = replace(self.config, **changes)
        if config.gate not in {"none", self.config.gate}:
            raise SettingError(
                f"gate={config.gate!r} was not fitted. Fit again with it and benign=... samples."
            )
        return ActivationRevision(config, self.tensors, self.metadata)

    def control(self, name: str, *, seed: int | None = None) -> "ActivationRevision":
        """Return a copy that should not work, to compare with.

        Args:
            name: One of `CONTROLS`.
            seed: Seed of random sites or directions; None keeps the fit's.

        Raises:
            SettingError: If there is no such control.
        """
        if name not in CONTROLS:
            raise SettingError(f"control {name!r} is unknown. Choose {', '.join(CONTROLS)}.")
        return self.select(**CONTROLS[name], seed=self.config.seed if seed is None else seed)

    @property
    def sites(self) -> tuple[tuple[int, int], ...]:
        """The revised (layer, head), best first; a head of -1 is a whole layer."""
        chosen = choose_sites(self.tensors, self.config, self._size("num_layers"))
        layers, heads = self.tensors["layers"][chosen], self.tensors["heads"][chosen]
        return tuple(zip(layers.tolist(), heads.tolist(), strict=True))

    @property
    def gate(self) -> Gate | None:
        """The condition on the prompt, with the threshold of the config's rate."""
        if self.config.gate == "none":
            return None
        details = self.metadata.details["gate"]
        threshold = choose_threshold(self.tensors["gate_scores"], self.config.gate_false_alarm_rate)
        return Gate(
            kind=self.config.gate,
            layer=details["layer"],
            weight=self.tensors["gate_weight"],
            center=self.tensors["gate_center"],
            bias=details["bias"],
            threshold=threshold,
        )

    def edits(self, *, strength: float = 1.0) -> list[Edit]:
        """Return what is added where.

        Args:
            strength: Factor of the fitted strength.
        """
        shifts = build_shifts(
            self.tensors, self.config, self._size("num_layers"), self._size("num_heads")
        )
        place = self.config.place
        return [Edit(place, layer, strength * shift) for layer, shift in shifts.items()]

    @contextmanager
    def apply(
        self,
        vlm: VLM,
        *,
        strength: float = 1.0,
        answer_start: Int[Tensor, " batch"] | None = None,
    ) -> Iterator[None]:
        """Defend `vlm.model(...)` and `vlm.model.generate(...)` inside a `with` block.

        Args:
            vlm: The model; given back bit for bit, also on an error.
            strength: Factor of the fitted strength: 1 is as fitted, 0 the undefended model,
                below 0 steers away from safe.
            answer_start: First answer column of each row, to score given answers as if they had
                been generated; None takes what a call gets for a prompt.

        Yields:
            Nothing.

        Raises:
            ShapeError: If the model has other sizes than the one it was fitted on.
            SettingError: If `strength` is not finite.
        """
        self._check_sizes(vlm)
        if not math.isfinite(strength):
            raise SettingError(f"strength={strength} must be a number; 1 is as fitted, 0 is off.")
        if strength == 0:
            yield
            return
        with apply_edits(
            vlm,
            [_on_model(vlm, edit) for edit in self.edits(strength=strength)],
            scope=TokenScope(self.config.scope, self.config.scope_tokens),
            norm_guard=self.config.norm_guard,
            gate=self.gate,
            answer_start=answer_start,
        ):
            yield

    def _check_tensors(self, folder: Path | str) -> None:
        is_gated = self.config.gate != "none"
        missing = {*SITE_TENSORS, *(GATE_TENSORS if is_gated else ())} - set(self.tensors)
        if missing:
            raise ArtifactError(f"{folder} lacks {sorted(missing)}. Fit and save it again.")

    def _size(self, name: str) -> int:
        return int(self.metadata.details["sizes"][name])

    def _check_sizes(self, vlm: VLM) -> None:
        found, fitted = _sizes(vlm), self.metadata.details["sizes"]
        if found != fitted:
            raise ShapeError(
                f"the revision was fitted on {self.metadata.base_model} with {fitted}, but "
                f"{vlm.name} has {found}. Load that model, or fit again with "
                "ActivationRevision.fit(...)."
            )


def _sizes(vlm: VLM) -> dict[str, int]:
    names = ("num_layers", "num_heads", "head_dim", "hidden_size")
    return {name: getattr(vlm.layout, name) for name in names}


def _on_model(vlm: VLM, edit: Edit) -> Edit:
    return replace(edit, shift=edit.shift.to(vlm.device, vlm.dtype))


def _read_position(samples: Sequence[Sample], config: ActivationRevisionConfig) -> str:
    if config.read_position != "auto":
        return config.read_position
    with_answer = sum(bool(sample.answer) for sample in samples)
    if with_answer not in {0, len(samples)}:
        raise DataError(
            f"{with_answer} of {len(samples)} samples have an answer. Give all of them one, or "
            "none, or name the read_position."
        )
    return "last_response_token" if with_answer else "last_prompt_token"


def _capture(  # noqa: PLR0917 - the arguments of one capture
    vlm: VLM,
    samples: Sequence[Sample],
    config: ActivationRevisionConfig,
    layers: Sequence[int],
    position: str,
    cache: Path | None,
    progress: Callable[[int], object] | None,
) -> Tensor:
    """Return activations [n, sites, width]."""
    place = config.place
    options: dict[str, Any] = {
        "places": [place],
        "layers": layers,
        "read_position": position,
        "batch_size": config.batch_size,
        "progress": progress,
    }
    if cache is None:
        states = capture_activations(vlm, samples, **options).tensors[place]
    else:
        store = capture_to_disk(vlm, samples, cache, **options)
        states = torch.stack([store.read(place, layer) for layer in layers], dim=1)
    return _as_sites(states, place)


def _as_sites(states: Tensor, place: str) -> Tensor:
    """Put the heads of all layers side by side."""
    return states.flatten(1, 2) if place == "heads" else states


def _check_captured(
    captured: Activations, samples: Sequence[Sample], place: str, layers: Sequence[int]
) -> Tensor:
    ids = tuple(sample.id for sample in samples)
    if captured.ids != ids or place not in captured.tensors or captured.layers != tuple(layers):
        raise DataError(
            f"the captured activations are of other samples, layers or places than '{place}' in "
            f"layers {list(layers)}. Capture these samples, or leave captured=... out."
        )
    return _as_sites(captured.tensors[place], place)


def _number_sites(vlm: VLM, place: str, layers: Sequence[int]) -> dict[str, Tensor]:
    heads = torch.arange(place_shape(vlm.layout, place)[0]) if place == "heads" else [-1]
    heads = torch.as_tensor(heads)
    return {
        "layers": torch.tensor(list(layers)).repeat_interleave(len(heads)),
        "heads": heads.repeat(len(layers)),
    }


def _details(vlm: VLM, samples: Sequence[Sample], position: str) -> dict[str, Any]:
    digest = hashlib.sha256()
    for sample in samples:
        pictures = [path.name for path in sample.images]
        record = [sample.id, sample.set_name, sample.prompt, sample.answer, pictures]
        digest.update(json.dumps(record).encode())
    return {
        "sizes": _sizes(vlm),
        "samples": dict(Counter(sample.set_name for sample in samples)),
        "groups": len({group_of(sample) for sample in samples}),
        "samples_sha256": digest.hexdigest(),
        "read_position": position,
    }
