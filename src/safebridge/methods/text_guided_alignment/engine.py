"""The loss of a batch: one pass for answers and pictures, text states from a pass or a cache."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, final

import torch
from jaxtyping import Float
from torch import Tensor

from safebridge.data.sample import Sample, open_images
from safebridge.errors import DataError, SettingError
from safebridge.methods.text_guided_alignment.cache import TextStateCache
from safebridge.methods.text_guided_alignment.config import TextGuidedAlignmentConfig, parse_layers
from safebridge.methods.text_guided_alignment.modules import TrainedParts, is_half
from safebridge.methods.text_guided_alignment.objective import (
    GuideTerms,
    answer_cross_entropy,
    build_batches,
    guide_terms,
)
from safebridge.methods.text_guided_alignment.states import (
    capture_layers,
    capture_text_states,
    pool_layers,
    shorten_logits,
)
from safebridge.models.load import VLM, measure_fingerprint
from safebridge.models.tokens import IGNORED_LABEL, Encoded, encode
from safebridge.training.loop import StepLoss

__all__ = ["Batch", "GuidedEngine", "Survey", "check_support", "survey_samples", "write_plainly"]

_PLAIN_TEMPLATE: Final = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


@final
@dataclass(frozen=True)
class Batch:
    """Samples that share a step."""

    indices: tuple[int, ...]
    """Their numbers."""

    progress: float
    """The share of the run that is over when the batch comes, in [0, 1]."""


@final
@dataclass(frozen=True)
class Survey:
    """What one look at every sample found; the samples themselves are not kept."""

    lengths: list[int]
    """Length of each sample in characters."""

    groups: list[int]
    """Number of pictures of each sample."""

    sha256: str
    """Digest of all samples."""


def check_support(vlm: VLM, config: TextGuidedAlignmentConfig) -> None:
    """Refuse models whose pictures have no tokens of their own in the decoder.

    Args:
        vlm: The model.
        config: What is to be fitted.

    Raises:
        SettingError: If the guide loss has nothing to align on this model.
    """
    if not config.has_guide:
        return
    if vlm.layout.cross_attention_layers or vlm.layout.image_token_id is None:
        raise SettingError(
            f"{vlm.name} ({vlm.layout.family}) reads pictures by cross-attention, so its decoder "
            "has no states of a picture to align. Use a model whose pictures become tokens, such "
            "as LLaVA, or set align_weight and pair_weight to 0."
        )
    if vlm.layout.family == "instructblip":
        raise SettingError(
            f"{vlm.name} reads no text without a picture, so a caption has no states of its own. "
            "Use a model such as LLaVA, or set align_weight and pair_weight to 0."
        )


def survey_samples(samples: Sequence[Sample], config: TextGuidedAlignmentConfig) -> Survey:
    """Look at every sample once.

    Args:
        samples: What to fit on, in memory or in a file.
        config: Whether answers are needed.

    Raises:
        DataError: If there are none, or one lacks an answer that is to be learnt.
    """
    lengths, groups, digest = [], [], hashlib.sha256()
    for sample in samples:
        if config.answer_weight and not (sample.answer or "").strip():
            raise DataError(
                f"sample '{sample.id}' has no answer to learn. Give it one, or train on the guide "
                "loss alone with answer_weight=0."
            )
        texts = [sample.id, sample.prompt, sample.answer, sample.caption, sample.retrieved]
        record = [*texts, [path.name for path in sample.images]]
        digest.update(json.dumps(record).encode())
        lengths.append(len(sample.prompt) + len(sample.answer or "") + len(sample.retrieved))
        groups.append(len(sample.images))
    if not lengths:
        raise DataError("no samples to fit on. Pass samples with pictures, answers and captions.")
    return Survey(lengths, groups, digest.hexdigest())


def write_plainly(vlm: VLM) -> VLM:
    """Return a handle whose turns are the pictures and the text, without a template.

    Args:
        vlm: The model; it and its processor stay as they are.
    """
    processor = copy(vlm.processor)
    placeholder = str(getattr(processor, "image_token", "") or "")
    processor.chat_template = _PLAIN_TEMPLATE.replace("IMAGE", placeholder)
    return replace(vlm, processor=processor)


@final
class GuidedEngine:
    """Computes the loss of a batch through the whole model, for every family.

    Args:
        vlm: The model with the trained parts in it.
        samples: Samples; pictures are opened when a batch needs them.
        config: The loss and where its states come from.
        parts: What is trained.
        cache: Folder of the text states, if they are kept; None takes a temporary one.
    """

    def __init__(
        self,
        vlm: VLM,
        samples: Sequence[Sample],
        config: TextGuidedAlignmentConfig,
        parts: TrainedParts,
        cache: Path | None = None,
    ) -> None:
        self.vlm, self.samples, self.config, self.parts = vlm, samples, config, parts
        self.written = write_plainly(vlm) if config.template == "plain" else vlm
        self.layers = parse_layers(config.layers, vlm.layout.num_layers)
        self.survey = survey_samples(samples, config)
        self.cache: TextStateCache | None = None
        if config.has_guide and config.is_text_state_constant:
            with parts.as_base():
                fingerprint = measure_fingerprint(vlm.model)
            self.cache = TextStateCache(
                cache,
                self._texts(),
                (len(self.layers), vlm.layout.hidden_size),
                dtype=config.cache_dtype,
                key=json.dumps([fingerprint, self.layers, config.pooling]),
            )

    def batches(self, epoch: int, total: int) -> list[Batch]:
        """Return the batches of an epoch.

        Args:
            epoch: Its number from 0.
            total: Batches of the whole run, for each batch's place in it.
        """
        survey, config = self.survey, self.config
        dealt = build_batches(survey.lengths, survey.groups, config.batch_size, config.seed + epoch)
        first = epoch * len(dealt)
        return [
            Batch(tuple(indices), min(1.0, (first + number) / max(1, total)))
            for number, indices in enumerate(dealt)
        ]

    def loss(self, batch: Batch) -> StepLoss:
        """Return the loss of a batch with its parts, differentiable in what is trained.

        Args:
            batch: Samples with equally many pictures.
        """
        config = self.config
        samples = [self.samples[index] for index in batch.indices]
        caption = self._text_states([sample.caption for sample in samples])
        encoded = self._encode(samples)
        with self._autocast(), capture_layers(self.vlm, self.layers) as states:
            answers = self._answers(encoded)
            terms = self._terms(samples, encoded, states, caption, batch.progress)
        by_set = {"answer": (float(answers.detach()) * len(samples), len(samples))}
        total = config.answer_weight * answers
        if terms is not None:
            guide = self._weigh(terms, by_set)
            total = total + self._route(guide)
        if not config.answer_weight:
            del by_set["answer"]
        return StepLoss(self._anchored(total), by_set)

    def _route(self, guide: Tensor) -> Tensor:
        """Return the guide loss with a gradient in what it is to train and nowhere else."""
        if self.config.is_guide_detached:
            return guide.detach()
        if not self.config.is_guide_apart or not guide.requires_grad:
            return guide
        projector = [self.parts.weights[name] for name in sorted(self.parts.projector)]
        gradients = torch.autograd.grad(guide, projector, retain_graph=True, allow_unused=True)
        # A function of the projector alone that has these gradients, and the value 0.
        linear = guide.new_zeros(())
        for gradient, weight in zip(gradients, projector, strict=True):
            if gradient is not None:
                linear = linear + (gradient * (weight - weight.detach())).sum()
        return guide.detach() + linear

    def _anchored(self, total: Tensor) -> Tensor:
        """Give a loss that nothing trained has touched, as of text alone, a graph of zeros."""
        if total.requires_grad or not torch.is_grad_enabled():
            return total
        trained = next(iter({**self.parts.weights, **self.parts.adapters}.values()))
        return total + 0.0 * trained.float().sum()

    def _answers(self, encoded: Encoded) -> Tensor:
        """Run the model; return the cross-entropy on the answers, or 0 without any."""
        labels = encoded.labels
        if labels is None:
            output = self.vlm.model(
                **encoded.inputs, use_cache=False, **shorten_logits(self.vlm, 1)
            )
            return torch.zeros((), device=output.logits.device)
        is_label = labels.ne(IGNORED_LABEL)
        # One column more than the labels span: a logit predicts the token after it.
        keep = is_label.shape[1] - int(is_label.any(dim=0).int().argmax()) + 1
        output = self.vlm.model(**encoded.inputs, use_cache=False, **shorten_logits(self.vlm, keep))
        return answer_cross_entropy(output.logits[:, -keep:], labels[:, -keep:])

    def _terms(
        self,
        samples: Sequence[Sample],
        encoded: Encoded,
        states: Sequence[Tensor],
        caption: Tensor | None,
        progress: float,
    ) -> GuideTerms | None:
        """Pool what the pass left and compare it; None where there is nothing to align."""
        config = self.config
        if caption is None or not bool(encoded.spans.image.any()):
            return None
        image = pool_layers(states, encoded.spans.image, pooling=config.pooling)
        retrieved = None
        if config.has_pair and config.retrieved == "text_pass":
            retrieved = self._text_states([sample.retrieved for sample in samples])
        elif config.has_pair:
            retrieved = pool_layers(states, encoded.spans.prefix, pooling=config.pooling)
            retrieved = retrieved.detach() if config.is_retrieved_detached else retrieved
        return guide_terms(
            image,
            caption,
            retrieved,
            form=config.form,
            reduction=config.reduction,
            centre=config.centre,
            progress=progress,
        )

    def _weigh(self, terms: GuideTerms, by_set: dict[str, tuple[float, int]]) -> Tensor:
        """Add the terms up, each over the samples that have it, and note them."""
        aligned, paired = int(terms.is_aligned.sum()), int(terms.is_paired.sum())
        by_set["align"] = (float(terms.align.detach().sum()), aligned)
        by_set["pair"] = (float(terms.pair.detach().sum()), paired)
        by_set["cosine"] = (float(terms.cosine.sum()), aligned)
        align = self.config.align_weight * terms.align.sum() / max(1, aligned)
        return align + self.config.pair_weight * terms.pair.sum() / max(1, paired)

    def _encode(self, samples: Sequence[Sample]) -> Encoded:
        config = self.config
        is_prefixed = config.retrieved == "prefix"
        is_plain = config.template == "plain"
        return encode(
            self.written,
            ["" if is_plain else sample.prompt for sample in samples],
            [open_images(sample) for sample in samples],
            [sample.answer or "" for sample in samples] if config.answer_weight else None,
            padding_side="left",
            prefixes=[sample.retrieved for sample in samples] if is_prefixed else None,
            prefix_format=config.retrieved_format,
        )

    def _text_states(self, texts: Sequence[str]) -> Float[Tensor, "layers batch hidden"] | None:
        """Return the states of texts, kept or read now; None if nothing needs them."""
        if not self.config.has_guide or not any(texts):
            return None
        if self.cache is not None:
            return self.cache.look_up(texts, self._read).to(self.vlm.device)
        return self._read(texts)

    def _read(self, texts: Sequence[str]) -> Float[Tensor, "layers batch hidden"]:
        is_base = self.config.teacher == "base"
        weights: AbstractContextManager[None] = self.parts.as_base() if is_base else nullcontext()
        with weights, self._autocast():
            return capture_text_states(self.vlm, texts, self.layers, pooling=self.config.pooling)

    def _texts(self) -> Iterator[str]:
        for sample in self.samples:
            yield sample.caption
            if self.config.retrieved == "text_pass":
                yield sample.retrieved

    def _autocast(self) -> Any:
        kind = self.config.autocast
        is_on = kind == "bfloat16" or (kind == "auto" and is_half(self.vlm))
        return torch.autocast(self.vlm.device.type, torch.bfloat16, enabled=is_on)
