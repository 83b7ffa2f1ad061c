"""The method itself: fit a security tensor, apply it, save it and load it."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, final

import torch
from torch import Tensor

from safebridge.data.sample import Sample, open_images
from safebridge.errors import DataError, ModelMismatchError, SettingError, ShapeError
from safebridge.methods.fitted import FittedMethod, describe_origin
from safebridge.methods.security_tensors.application import apply_tensors
from safebridge.methods.security_tensors.cache import TensorCache
from safebridge.methods.security_tensors.config import SET_NAMES, SecurityTensorsConfig
from safebridge.methods.security_tensors.decoder_engine import DecoderEngine
from safebridge.methods.security_tensors.engines import Engine, build_engine
from safebridge.methods.security_tensors.modules import SecurityTensorModule, build_module
from safebridge.methods.security_tensors.objective import build_batches
from safebridge.methods.security_tensors.pixels import find_pixel_limits
from safebridge.methods.security_tensors.stages import Stage, plan_stages
from safebridge.models.load import VLM
from safebridge.models.tokens import encode
from safebridge.training.attention import quick_attention
from safebridge.training.loop import (
    LoopResult,
    LoopSettings,
    ParameterGroup,
    StepLoss,
    TrainingEvent,
    freeze,
    train,
)

__all__ = ["SecurityTensors"]

Validation = Sequence[Sample] | Callable[["SecurityTensors"], float]


@final
class SecurityTensors(FittedMethod[SecurityTensorsConfig]):
    """A security tensor: fitted virtual tokens, a fitted pixel tensor, or both.

    Args:
        config: The settings it was fitted with.
        tensors: "tokens" [n, hidden] and/or "pixels" [channels, height, width], float32.
        metadata: Model, data and seed it comes from.

    Source:
        Li et al. 2025, "Security Tensors as a Cross-Modal Bridge" (arXiv:2507.20994).
        docs/security-tensors.md lists what is the paper's and where we depart from it.
    """

    kind = "security-tensors"
    config_class = SecurityTensorsConfig

    @classmethod
    def fit(
        cls,
        vlm: VLM,
        samples: Sequence[Sample],
        config: SecurityTensorsConfig | None = None,
        *,
        validation: Validation | None = None,
        progress: Callable[[TrainingEvent], object] | None = None,
        checkpoint: Path | None = None,
        cache: Path | None = None,
        data_source: str = "",
    ) -> "SecurityTensors":
        """Learn a security tensor; model and samples stay as they were.

        Each sample's `set_name` is "SA", "TCB" or "GB" and its `answer` is the target: a
        refusal for SA, the model's own answer for the two benign sets.

        Args:
            vlm: The model to defend. Its weights are not touched, copied or trained.
            samples: What to learn from.
            config: The settings; None takes the defaults.
            validation: After each epoch either the held-out loss of these samples, or any
                score of the tensor so far (higher is better). The best epoch is kept.
            progress: Told the loss of each set after each step and epoch.
            checkpoint: File to resume from and to write after each epoch; a second stage
                writes one beside it.
            cache: Folder for what is computed once (keys and values, preprocessed pictures,
                the undefended model's answers) and found by later fits; None takes a
                temporary one.
            data_source: Name of the data for the artifact; a digest of the samples is
                stored in any case.

        Returns:
            The fitted tensor.

        Raises:
            DataError: If a sample has an unknown set or no answer, or there are none.
            SettingError: If settings do not go together or the loss diverges.
        """
        config = config or SecurityTensorsConfig()
        _check_samples(samples)
        runs: list[tuple[LoopResult, Engine]] = []
        with freeze(vlm.model), quick_attention(vlm), _open_cache(cache) as store:
            module = build_module(vlm, config, _first_inputs(vlm, samples, config))
            for number, stage in enumerate(plan_stages(config)):
                part = module.part(*stage.present)
                for name, parameter in part.named_parameters():
                    parameter.requires_grad_(name in stage.trained)
                engine = build_engine(vlm, samples, config, part, store)
                result = _run_stage(
                    engine,
                    samples,
                    config,
                    stage,
                    part,
                    validate=_score_of(vlm, validation, config, part, store),
                    progress=progress,
                    checkpoint=_stage_checkpoint(checkpoint, number),
                    after_step=_bound(vlm, config, part),
                )
                runs.append((result, engine))
        source = data_source or f"{len(samples)} samples"
        details = _details(samples, runs)
        return cls(config, module.tensors(), describe_origin(vlm, config, source, details))

    @contextmanager
    def apply(self, vlm: VLM, *, strength: float = 1.0) -> Iterator[None]:
        """Defend `vlm.model(...)` and `vlm.model.generate(...)` inside a `with` block.

        Args:
            vlm: The model; given back bit for bit, also on an error.
            strength: 1 is as fitted and 0 the undefended model. In between, every
                virtual token counts in the attention as `strength` copies of itself, and
                the pixel tensor is scaled.

        Yields:
            Nothing.

        Raises:
            ShapeError: If the virtual tokens have another width than the model.
            SettingError: If `strength` is negative.
            SafebridgeError: If a security tensor is already applied to this model.
        """
        self._check_sizes(vlm)
        tokens, pixels = self.tensors.get("tokens"), self.tensors.get("pixels")
        with apply_tensors(
            vlm,
            tokens=None if tokens is None else tokens.to(vlm.device),
            pixels=None if pixels is None else pixels.to(vlm.device),
            position=self.config.position,
            applies_to=self.config.applies_to,
            strength=strength,
        ):
            yield

    def _check_tensors(self, folder: Path | str) -> None:
        expected = {"tokens"} if self.config.has_text else set()
        expected |= {"pixels"} if self.config.has_visual else set()
        if set(self.tensors) != expected:
            raise ModelMismatchError(
                f"{folder} holds {sorted(self.tensors)}, but its modality "
                f"'{self.config.modality}' needs {sorted(expected)}. Fit and save it again."
            )

    def _check_sizes(self, vlm: VLM) -> None:
        tokens = self.tensors.get("tokens")
        if tokens is not None and tokens.shape[-1] != vlm.layout.hidden_size:
            raise ShapeError(
                f"the virtual tokens have {tokens.shape[-1]} features but {vlm.name} has "
                f"{vlm.layout.hidden_size}. They were fitted on {self.metadata.base_model} "
                f"(fingerprint {self.metadata.fingerprint[:8]}); load that model, or fit again "
                "with SecurityTensors.fit(...)."
            )


def _check_samples(samples: Sequence[Sample]) -> None:
    if not samples:
        raise DataError("no samples to fit on. Pass SA, TCB and GB samples; see build_triad.")
    for sample in samples:
        if sample.set_name not in SET_NAMES:
            raise DataError(
                f"sample '{sample.id}' is of set '{sample.set_name}'; known are "
                f"{', '.join(SET_NAMES)}. Set its set_name; nothing is guessed, because a wrong "
                "set teaches the opposite answer."
            )
        if not (sample.answer or "").strip():
            raise DataError(
                f"sample '{sample.id}' has no answer to learn. Give a refusal (SA) or the model's "
                "own answer (TCB, GB); build_triad does both."
            )


def _first_inputs(
    vlm: VLM, samples: Sequence[Sample], config: SecurityTensorsConfig
) -> Mapping[str, Tensor] | None:
    """Preprocess one sample for the shape of its pictures."""
    if not config.has_visual:
        return None
    sample = next((sample for sample in samples if sample.images), None)
    if sample is None:
        raise SettingError('a visual tensor needs pictures. Use modality="textual".')
    return encode(vlm, [sample.prompt], [open_images(sample)]).inputs


@contextmanager
def _open_cache(folder: Path | None) -> Iterator[TensorCache]:
    if folder is not None:
        yield TensorCache(folder)
        return
    with TemporaryDirectory(prefix="safebridge-") as temporary:
        yield TensorCache(Path(temporary))


def _stage_checkpoint(checkpoint: Path | None, number: int) -> Path | None:
    if checkpoint is None or number == 0:
        return checkpoint
    return checkpoint.with_name(f"{checkpoint.name}.{number + 1}")


def _bound(
    vlm: VLM, config: SecurityTensorsConfig, module: SecurityTensorModule
) -> Callable[[], None] | None:
    """Return what brings the visual tensor back within its bound, if it has one."""
    pixels = module.pixels
    if pixels is None or config.max_change_pixels_255 == 0:
        return None
    limits = find_pixel_limits(vlm, config.max_change_pixels_255).to(pixels.device)

    def bound() -> None:
        with torch.no_grad():
            pixels.copy_(pixels.clamp(-limits, limits))

    return bound


def _run_stage(
    engine: Engine,
    samples: Sequence[Sample],
    config: SecurityTensorsConfig,
    stage: Stage,
    module: SecurityTensorModule,
    *,
    validate: Callable[[], float] | None,
    progress: Callable[[TrainingEvent], object] | None,
    checkpoint: Path | None,
    after_step: Callable[[], None] | None,
) -> LoopResult:
    if after_step is not None:
        after_step()  # the start values keep the bound as well
    return train(
        _groups(module, config, stage),
        lambda epoch: _batches(engine, samples, config, config.seed + epoch),
        lambda batch: _step_loss(engine, samples, config, batch),
        LoopSettings.pick(config),
        validate=validate,
        progress=progress,
        checkpoint=checkpoint,
        after_step=after_step,
        split=_split,
    )


def _split(batch: Sequence[int], process: int, processes: int) -> tuple[Sequence[int], float]:
    part = batch[process::processes]
    return part, len(part) / len(batch)


def _groups(
    module: SecurityTensorModule, config: SecurityTensorsConfig, stage: Stage
) -> list[ParameterGroup]:
    rates = {"tokens": config.learning_rate, "pixels": config.visual_learning_rate}
    return [
        ParameterGroup({name: parameter}, rates[name], config.weight_decay)
        for name, parameter in module.named_parameters()
        if name in stage.trained
    ]


def _batches(
    engine: Engine, samples: Sequence[Sample], config: SecurityTensorsConfig, seed: int
) -> list[list[int]]:
    names = [sample.set_name for sample in samples]
    return build_batches(engine.lengths, engine.groups, names, config.batch_size, seed)


def _step_loss(
    engine: Engine,
    samples: Sequence[Sample],
    config: SecurityTensorsConfig,
    batch: Sequence[int],
) -> StepLoss:
    losses = engine.losses(batch)
    names = [samples[index].set_name for index in batch]
    factors = config.set_weights
    weights = torch.tensor([factors[name] for name in names], device=losses.device)
    by_set: dict[str, tuple[float, int]] = {}
    for name, value in zip(names, losses.detach().tolist(), strict=True):
        total, count = by_set.get(name, (0.0, 0))
        by_set[name] = (total + value, count + 1)
    return StepLoss((weights * losses).mean(), by_set)


def _score_of(
    vlm: VLM,
    validation: Validation | None,
    config: SecurityTensorsConfig,
    module: SecurityTensorModule,
    cache: TensorCache,
) -> Callable[[], float] | None:
    """Turn a validation into a score of the parameters as they are when it is called."""
    if validation is None:
        return None
    if callable(validation):
        metadata = describe_origin(vlm, config, "fit in progress", {})
        return lambda: validation(SecurityTensors(config, module.tensors(), metadata))
    held_out = list(validation)
    _check_samples(held_out)
    engine = build_engine(vlm, held_out, config, module, cache)

    def score() -> float:
        by_set: dict[str, list[float]] = {}
        for batch in _batches(engine, held_out, config, config.seed):
            with torch.no_grad():
                values = engine.losses(batch).tolist()
            for index, value in zip(batch, values, strict=True):
                by_set.setdefault(held_out[index].set_name, []).append(value)
        return -sum(sum(values) / len(values) for values in by_set.values()) / len(by_set)

    return score


def _details(
    samples: Sequence[Sample], runs: Sequence[tuple[LoopResult, Engine]]
) -> dict[str, Any]:
    digest = hashlib.sha256()
    for sample in samples:
        pictures = [path.name for path in sample.images]
        record = [sample.id, sample.set_name, sample.prompt, sample.answer, pictures]
        digest.update(json.dumps(record).encode())
    paths = ["decoder" if isinstance(engine, DecoderEngine) else "model" for _, engine in runs]
    return {
        "samples": dict(Counter(sample.set_name for sample in samples)),
        "samples_sha256": digest.hexdigest(),
        "steps": sum(result.steps for result, _ in runs),
        "losses": [epoch for result, _ in runs for epoch in result.epochs],
        "is_stopped_early": any(result.is_stopped_early for result, _ in runs),
        "path": ", ".join(dict.fromkeys(paths)),
    }
