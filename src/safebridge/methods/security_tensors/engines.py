"""The loss of a batch through the whole model, and the choice of the fastest way that is exact."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, final

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from safebridge.data.sample import Sample
from safebridge.methods.security_tensors.application import apply_tensors
from safebridge.methods.security_tensors.cache import TensorCache
from safebridge.methods.security_tensors.config import SecurityTensorsConfig
from safebridge.methods.security_tensors.decoder_engine import (
    DecoderEngine,
    autocast,
    mark_benign,
)
from safebridge.methods.security_tensors.modules import SecurityTensorModule
from safebridge.methods.security_tensors.objective import answer_cross_entropy, keep_first_labels
from safebridge.methods.security_tensors.prepare import encode_samples, prepare_samples
from safebridge.methods.security_tensors.references import References
from safebridge.models.hooks import replace_method
from safebridge.models.load import VLM
from safebridge.models.tokens import IGNORED_LABEL, Encoded

__all__ = ["Engine", "ModelEngine", "build_engine", "checkpoint_layers"]

_TOLERANCE = {torch.float32: 2e-3, torch.float64: 2e-3}
_LOOSE_TOLERANCE = 0.1  # relative, for half-precision weights


@final
class ModelEngine:
    """Runs the whole model: right for every family and both modalities.

    Args:
        vlm: The frozen model.
        samples: Samples with answers; pictures are opened when a batch needs them.
        config: Kind of tensor and of loss.
        module: The tensor that is trained.
        cache: Where the undefended model's answers are kept; None keeps them in memory.
    """

    def __init__(
        self,
        vlm: VLM,
        samples: Sequence[Sample],
        config: SecurityTensorsConfig,
        module: SecurityTensorModule,
        cache: TensorCache | None = None,
    ) -> None:
        self.vlm, self.samples, self.config, self.module = vlm, samples, config, module
        self.lengths = [len(sample.prompt) + len(sample.answer or "") for sample in samples]
        self.groups = [len(sample.images) for sample in samples]
        self.references = References(vlm, samples, config, cache or TensorCache())
        parameters = inspect.signature(vlm.model.forward).parameters
        self.can_keep = "logits_to_keep" in parameters

    def losses(self, indices: Sequence[int]) -> Tensor:
        """Return one loss per sample, differentiable in the tensor.

        Args:
            indices: Samples of one group.
        """
        chosen = [self.samples[index] for index in indices]
        encoded = encode_samples(self.vlm, chosen, padding_side="left")
        assert encoded.labels is not None  # noqa: S101 - answers were given
        labels = keep_first_labels(encoded.labels, self.config.max_answer_tokens)
        is_label = labels.ne(IGNORED_LABEL)
        # One column more than the labels span: a logit predicts the token after it.
        keep = is_label.shape[1] - int(is_label.any(dim=0).int().argmax()) + 1
        targets, wanted = labels[:, 1 - keep :], is_label[:, 1 - keep :]
        module, position = self.module, self.config.position
        with (
            autocast(self.vlm, self.config),
            checkpoint_layers(self.vlm.model, is_on=self.config.is_gradient_checkpointed),
            apply_tensors(
                self.vlm,
                tokens=module.tokens,
                pixels=module.pixels,
                position=position,
                applies_to=self.config.applies_to,
            ),
        ):
            logits = self._logits(encoded, keep)[wanted]
        rows = wanted.nonzero()[:, 0]
        losses = answer_cross_entropy(logits, targets[wanted], rows, len(chosen))
        is_benign = mark_benign(chosen, self.config, losses.device)
        if is_benign.any():
            own = is_benign[rows]

            def ask() -> Tensor:
                with autocast(self.vlm, self.config):
                    return self._logits(encoded, keep)[wanted][own]

            kl = self.references.divergences(indices, logits[own], rows[own], ask)
            losses = torch.where(is_benign, kl, losses)
        return losses

    def _logits(self, encoded: Encoded, keep: int) -> Tensor:
        kept = {"logits_to_keep": keep} if self.can_keep else {}
        logits: Tensor = self.vlm.model(**encoded.inputs, **kept, use_cache=False).logits
        return logits[:, -keep:-1]


Engine = ModelEngine | DecoderEngine
"""Computes one loss per sample; `lengths` and `groups` say which samples share a batch."""


def build_engine(
    vlm: VLM,
    samples: Sequence[Sample],
    config: SecurityTensorsConfig,
    module: SecurityTensorModule,
    cache: TensorCache | None = None,
) -> Engine:
    """Choose the fastest engine that gives the model's own loss.

    The decoder alone is enough if it takes nothing but embeddings, a mask and positions.
    This is found out by stopping the model at its decoder, and the losses of two samples
    are compared with the whole model's before it is relied on.

    Args:
        vlm: The frozen model.
        samples: Samples with answers.
        config: Kind of tensor and of loss.
        module: The tensor that is trained.
        cache: Where what is computed once is kept; None keeps it in memory.
    """
    whole = ModelEngine(vlm, samples, config, module, cache)
    if config.is_gradient_checkpointed and module.pixels is not None:
        return whole
    prepared = prepare_samples(vlm, samples, max_answer_tokens=config.max_answer_tokens)
    if prepared is None:
        return whole
    decoder = DecoderEngine(vlm, samples, config, module, prepared, cache=cache)
    shortest = sorted(range(len(samples)), key=lambda index: decoder.lengths[index])[:2]
    checked = (
        [shortest]
        if len({whole.groups[index] for index in shortest}) == 1
        else [[index] for index in shortest]
    )
    tolerance = _TOLERANCE.get(vlm.dtype, _LOOSE_TOLERANCE)
    if config.autocast != "none":
        tolerance = _LOOSE_TOLERANCE
    with torch.no_grad():
        for indices in checked:
            expected, found = whole.losses(indices), decoder.losses(indices)
            if not torch.allclose(found, expected, rtol=tolerance, atol=tolerance):
                return whole
    return decoder


@contextmanager
def checkpoint_layers(model: Any, *, is_on: bool) -> Iterator[None]:
    """Let every layer of towers and decoder be computed again in the backward pass.

    transformers does this in training mode alone, which would switch dropout on.

    Args:
        model: The model; given back as it was.
        is_on: False changes nothing.

    Yields:
        Nothing.
    """
    with ExitStack() as stack:
        for module in model.modules() if is_on else ():
            if isinstance(module, GradientCheckpointingLayer):
                stack.enter_context(replace_method(module, "forward", _run_checkpointed))
        yield


def _run_checkpointed(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return original(*args, **kwargs)
    return checkpoint(original, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
