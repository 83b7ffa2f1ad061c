"""The method itself: align a model's pictures with their captions, apply, save and load."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, final

import torch

from safebridge.data.sample import Sample
from safebridge.errors import ArtifactError
from safebridge.methods.fitted import FittedMethod, describe_origin
from safebridge.methods.text_guided_alignment.config import TextGuidedAlignmentConfig
from safebridge.methods.text_guided_alignment.engine import GuidedEngine, check_support
from safebridge.methods.text_guided_alignment.modules import (
    TrainedParts,
    apply_weights,
    checkpoint_layers,
    train_parts,
)
from safebridge.models.load import VLM
from safebridge.optional import require
from safebridge.training.attention import quick_attention
from safebridge.training.loop import (
    LoopResult,
    LoopSettings,
    ParameterGroup,
    TrainingEvent,
    freeze,
    train,
)

__all__ = ["TextGuidedAlignment"]

Validation = Sequence[Sample] | Callable[[], float]


@final
class TextGuidedAlignment(FittedMethod[TextGuidedAlignmentConfig]):
    """Fitted weights that let a model's text safety work on pictures.

    Args:
        config: The settings it was fitted with.
        tensors: Weights by their names in the model, and adapters by their modules' names
            with ".lora_A" [rank, in] and ".lora_B" [out, rank], the scale inside the latter.
        metadata: Model, data and seed it comes from.

    Source:
        Xu et al. 2024, "Cross-Modal Safety Mechanism Transfer in Large Vision-Language
        Models" (arXiv:2410.12662). docs/text-guided-alignment.md lists what is the
        paper's, what is its repository's and where we depart from both.
    """

    kind = "text-guided-alignment"
    config_class = TextGuidedAlignmentConfig

    @classmethod
    def fit(
        cls,
        vlm: VLM,
        samples: Sequence[Sample],
        config: TextGuidedAlignmentConfig | None = None,
        *,
        validation: Validation | None = None,
        progress: Callable[[TrainingEvent], object] | None = None,
        checkpoint: Path | None = None,
        cache: Path | None = None,
        data_source: str = "",
    ) -> "TextGuidedAlignment":
        """Align pictures with their captions; model and samples stay as they were.

        A sample's `answer` is the target of the cross-entropy, its `caption` says what its
        pictures show, and `retrieved` is another text close to that. A sample without a
        picture or a caption counts in the cross-entropy alone.

        Args:
            vlm: The model to align.
            samples: What to learn from; a `LlavaFile` reads them from disk as they are needed.
            config: The settings; None takes the defaults.
            validation: After each epoch either the held-out loss of these samples, or any
                score of the model as it is at that moment (higher is better). The best
                epoch is kept.
            progress: Told the loss of answers, align and pair term, and the cosine of
                pictures and captions, after each step and epoch.
            checkpoint: File to resume from and to write after each epoch.
            cache: Folder for the states of captions where they do not change, for this fit
                and later ones; None takes a temporary one.
            data_source: Name of the data for the artifact; a digest of the samples is
                stored in any case.

        Returns:
            The fitted weights.

        Raises:
            DataError: If there are no samples, or one lacks an answer.
            SettingError: If the model or the settings do not go together, or the loss
                diverges.
            ArtifactError: If the cache or the checkpoint cannot be used.
        """
        config = config or TextGuidedAlignmentConfig()
        check_support(vlm, config)
        with ExitStack() as stack:
            stack.enter_context(freeze(vlm.model))
            stack.enter_context(quick_attention(vlm))
            if config.has_gradient_checkpointing:
                stack.enter_context(checkpoint_layers(vlm))
            parts = stack.enter_context(train_parts(vlm, config))
            engine = GuidedEngine(vlm, samples, config, parts, cache)
            total = _total_batches(engine, config)
            result = train(
                _groups(parts, config),
                lambda epoch: engine.batches(epoch, total),
                engine.loss,
                LoopSettings.pick(config),
                validate=_score_of(vlm, validation, config, parts),
                progress=progress,
                checkpoint=checkpoint,
            )
            tensors = {name: value.cpu() for name, value in parts.tensors().items()}
        details = _details(result, engine)
        source = data_source or f"{len(samples)} samples"
        return cls(config, tensors, describe_origin(vlm, config, source, details))

    @contextmanager
    def apply(self, vlm: VLM, *, strength: float = 1.0) -> Iterator[None]:
        """Put the fitted weights into the model inside a `with` block.

        Args:
            vlm: The model; given back bit for bit, also on an error.
            strength: 1 is as fitted and 0 the model as it is; in between, and beyond, the
                weights lie on the line through both.

        Yields:
            Nothing.

        Raises:
            ShapeError: If the weights do not fit the model.
            SettingError: If `strength` is negative.
            SafebridgeError: If aligned weights are in this model already.
        """
        # Taken before weights change, so that what is fitted inside names the model as it was.
        _ = vlm.fingerprint
        with apply_weights(vlm, self.tensors, strength=strength):
            yield

    def _check_tensors(self, folder: Path | str) -> None:
        if not self.tensors:
            raise ArtifactError(f"{folder} holds no weights. Fit and save it again.")

    def _check_sizes(self, vlm: VLM) -> None:
        with self.apply(vlm):  # a weight that does not fit is better found now
            pass


def _total_batches(engine: GuidedEngine, config: TextGuidedAlignmentConfig) -> int:
    """Return how many batches the run takes, all processes together."""
    planned = config.epochs * len(engine.batches(0, 1))
    if not config.max_steps:
        return planned
    world = int(require("accelerate", extra="training").PartialState().num_processes)
    return min(planned, config.max_steps * config.accumulation_steps * world)


def _groups(parts: TrainedParts, config: TextGuidedAlignmentConfig) -> list[ParameterGroup]:
    """Give the projector its step size and everything after it another."""
    named = {**parts.weights, **parts.adapters}
    is_late = {name: name in parts.adapters or name not in parts.projector for name in named}
    rates = {False: config.learning_rate, True: config.language_learning_rate}
    groups = []
    for late, rate in rates.items():
        own = {name: value for name, value in named.items() if is_late[name] == late}
        if own:
            groups.append(ParameterGroup(own, rate, config.weight_decay))
    return groups


def _score_of(
    vlm: VLM,
    validation: Validation | None,
    config: TextGuidedAlignmentConfig,
    parts: TrainedParts,
) -> Callable[[], float] | None:
    """Turn a validation into a score of the model as it is when it is called."""
    if validation is None or callable(validation):
        return validation
    engine = GuidedEngine(vlm, validation, config, parts)

    def score() -> float:
        total, count = 0.0, 0
        for batch in engine.batches(0, 1):
            with torch.no_grad():
                total += float(engine.loss(batch).loss) * len(batch.indices)
            count += len(batch.indices)
        return -total / count

    return score


def _details(result: LoopResult, engine: GuidedEngine) -> dict[str, Any]:
    return {
        "samples": len(engine.survey.lengths),
        "samples_with_pictures": sum(count > 0 for count in engine.survey.groups),
        "samples_sha256": engine.survey.sha256,
        "layers": list(engine.layers),
        "texts_kept": 0 if engine.cache is None else engine.cache.filled,
        "steps": result.steps,
        "losses": result.epochs,
        "is_stopped_early": result.is_stopped_early,
    }
