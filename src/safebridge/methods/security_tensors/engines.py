"""Two ways to compute the loss of a batch: through the whole model, or the decoder alone."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from safebridge.data.sample import Sample
from safebridge.methods.security_tensors.application import apply_tensors
from safebridge.methods.security_tensors.config import SecurityTensorsConfig
from safebridge.methods.security_tensors.insertion import (
    find_insertion_points,
    insert_columns,
    place_tokens,
    shift_positions,
)
from safebridge.methods.security_tensors.modules import SecurityTensorModule
from safebridge.methods.security_tensors.objective import (
    answer_cross_entropy,
    answer_forward_kl,
    keep_first_labels,
)
from safebridge.methods.security_tensors.prepare import (
    Prepared,
    encode_samples,
    prepare_samples,
)
from safebridge.models.load import VLM
from safebridge.models.tokens import IGNORED_LABEL, Encoded

__all__ = ["DecoderEngine", "Engine", "ModelEngine", "build_engine"]

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
    """

    def __init__(
        self,
        vlm: VLM,
        samples: Sequence[Sample],
        config: SecurityTensorsConfig,
        module: SecurityTensorModule,
    ) -> None:
        self.vlm, self.samples, self.config, self.module = vlm, samples, config, module
        self.lengths = [len(sample.prompt) + len(sample.answer or "") for sample in samples]
        self.groups = [len(sample.images) for sample in samples]
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
            _autocast(self.vlm, self.config),
            apply_tensors(self.vlm, tokens=module.tokens, pixels=module.pixels, position=position),
        ):
            logits = self._logits(encoded, keep)[wanted]
        rows = wanted.nonzero()[:, 0]
        losses = answer_cross_entropy(logits, targets[wanted], rows, len(chosen))
        is_benign = _benign(chosen, self.config, losses.device)
        if is_benign.any():
            with torch.no_grad(), _autocast(self.vlm, self.config):
                reference = self._logits(encoded, keep)[wanted]
            kl = answer_forward_kl(logits, reference, rows, len(chosen))
            losses = torch.where(is_benign, kl, losses)
        return losses

    def _logits(self, encoded: Encoded, keep: int) -> Tensor:
        kept = {"logits_to_keep": keep} if self.can_keep else {}
        logits: Tensor = self.vlm.model(**encoded.inputs, **kept, use_cache=False).logits
        return logits[:, -keep:-1]


@final
class DecoderEngine:
    """Runs the decoder on cached image features, and its head at answer tokens alone.

    As a prefix sees only itself, its keys and values are computed once per batch and
    shared by all rows; their gradients add up.

    Args:
        vlm: The frozen model.
        samples: Samples with answers.
        config: Kind of tensor and of loss.
        module: The tensor that is trained.
        prepared: The samples' ids and image features.
        is_shared: Whether rows share the prefix; False computes it in each row.
    """

    def __init__(
        self,
        vlm: VLM,
        samples: Sequence[Sample],
        config: SecurityTensorsConfig,
        module: SecurityTensorModule,
        prepared: Prepared,
        *,
        is_shared: bool = True,
    ) -> None:
        self.vlm, self.samples, self.config, self.module = vlm, samples, config, module
        self.prepared, self.is_shared = prepared, is_shared
        self.lengths = [len(example.input_ids) for example in prepared.examples]
        self.groups = [0] * len(samples)
        self.decoder: Any = vlm.layout.get(vlm.model, "language_model")
        self.head = vlm.layout.get(vlm.model, "lm_head")
        self.embed = vlm.layout.get(vlm.model, "embed_tokens")
        self.references: dict[int, Tensor] = {}

    def losses(self, indices: Sequence[int]) -> Tensor:
        """Return one loss per sample, differentiable in the tensor.

        Args:
            indices: Any samples.
        """
        batch = self._collate(indices)
        wanted = batch.labels.ne(IGNORED_LABEL)
        rows = wanted.nonzero()[:, 0]
        with _autocast(self.vlm, self.config):
            logits = self.head(self._hidden(batch)[wanted])
        losses = answer_cross_entropy(logits, batch.labels[wanted], rows, len(indices))
        chosen = [self.samples[index] for index in indices]
        is_benign = _benign(chosen, self.config, losses.device)
        if is_benign.any():
            with torch.no_grad(), _autocast(self.vlm, self.config):
                reference = self.head(self._reference(indices, batch, wanted))
            kl = answer_forward_kl(logits, reference, rows, len(indices))
            losses = torch.where(is_benign, kl, losses)
        return losses

    def _collate(self, indices: Sequence[int]) -> "_Batch":
        """Pad to the right; the last token predicts nothing, so it is left out."""
        examples = [self.prepared.examples[index] for index in indices]
        ids = _pad([example.input_ids[:-1] for example in examples])
        labels = _pad([example.labels[1:] for example in examples], IGNORED_LABEL)
        is_image = _pad([example.is_image[:-1] for example in examples])
        mask = _pad([torch.ones_like(example.input_ids[:-1]) for example in examples])
        device = self.vlm.device
        with torch.no_grad():
            # An image id may lie outside the embedding; what it gives is replaced anyway.
            embeddings = self.embed(ids.masked_fill(is_image, 0).to(device))
            features = [self.prepared.features[e.picture] for e in examples if e.is_image.any()]
            if features:
                flat = torch.cat(features).to(device, embeddings.dtype)
                embeddings = embeddings.masked_scatter(is_image[..., None].to(device), flat)
        at = find_insertion_points(
            is_image.long(), mask, self.config.position, image_token_id=1
        ).to(device)
        positions = _pad_positions([example.position_ids for example in examples], ids.shape[1])
        return _Batch(
            embeddings,
            mask.to(device),
            labels.to(device),
            None if positions is None else positions.to(device),
            at,
        )

    def _hidden(self, batch: "_Batch") -> Tensor:
        """Run the decoder with the virtual tokens; return the original positions."""
        assert self.module.tokens is not None  # noqa: S101 - this engine is for textual tensors
        tokens = self.module.tokens.to(batch.embeddings.dtype)
        n, size = tokens.shape[0], batch.embeddings.shape[0]
        mask = insert_columns(batch.mask, batch.at, n, 1)
        positions = batch.position_ids
        if positions is not None:
            positions = shift_positions(positions, batch.at, n)
        if self.is_shared and self.config.position == "prefix":
            cache = self._prefix_cache(tokens, positions, size)
            positions = None if positions is None else positions[..., n:]
            return self._decode(batch.embeddings, mask, positions, cache)
        opened = insert_columns(batch.embeddings, batch.at, n, 0)
        hidden = self._decode(place_tokens(opened, tokens, batch.at), mask, positions)
        columns = torch.arange(batch.mask.shape[1], device=hidden.device)
        source = columns + n * (columns >= batch.at[:, None])
        return hidden[torch.arange(size, device=hidden.device)[:, None], source]

    def _prefix_cache(self, tokens: Tensor, positions: Tensor | None, size: int) -> DynamicCache:
        """Compute the prefix's keys and values once and lend them to every row."""
        cache = DynamicCache()
        first = None if positions is None else positions[..., :1, : tokens.shape[0]]
        self.decoder(
            inputs_embeds=tokens[None], position_ids=first, past_key_values=cache, use_cache=True
        )
        return DynamicCache(
            [
                (layer.keys.expand(size, -1, -1, -1), layer.values.expand(size, -1, -1, -1))
                for layer in cache.layers
            ]
        )

    def _decode(
        self,
        embeddings: Tensor,
        mask: Tensor,
        positions: Tensor | None,
        cache: DynamicCache | None = None,
    ) -> Tensor:
        output = self.decoder(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _reference(self, indices: Sequence[int], batch: "_Batch", wanted: Tensor) -> Tensor:
        """Return the undefended model's hidden states at the answer tokens, kept after first use.

        They are as exact as its distribution and smaller by vocabulary over width.
        """
        missing = any(index not in self.references for index in indices)
        if missing:
            hidden = self._decode(batch.embeddings, batch.mask, batch.position_ids)
            for row, index in enumerate(indices):
                self.references[index] = hidden[row, wanted[row]].cpu()
        stored = [self.references[index] for index in indices]
        return torch.cat(stored).to(batch.embeddings.device)


@dataclass(frozen=True)
class _Batch:
    """Padded inputs of the decoder, and labels moved one to the left."""

    embeddings: Tensor
    mask: Tensor
    labels: Tensor
    position_ids: Tensor | None
    at: Tensor


Engine = ModelEngine | DecoderEngine
"""Computes one loss per sample; `lengths` and `groups` say which samples share a batch."""


def build_engine(
    vlm: VLM,
    samples: Sequence[Sample],
    config: SecurityTensorsConfig,
    module: SecurityTensorModule,
) -> Engine:
    """Choose the fastest engine that gives the model's own loss.

    A textual tensor needs the decoder alone, if the decoder takes nothing but embeddings,
    a mask and positions. This is found out by stopping the model at its decoder, and the
    losses of two samples are compared with the whole model's before it is relied on.

    Args:
        vlm: The frozen model.
        samples: Samples with answers.
        config: Kind of tensor and of loss.
        module: The tensor that is trained.
    """
    whole = ModelEngine(vlm, samples, config, module)
    if config.has_visual:
        return whole
    prepared = prepare_samples(vlm, samples, max_answer_tokens=config.max_answer_tokens)
    if prepared is None:
        return whole
    decoder = DecoderEngine(vlm, samples, config, module, prepared)
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


def _pad(rows: Sequence[Tensor], fill: int = 0) -> Tensor:
    return pad_sequence(list(rows), batch_first=True, padding_value=fill)


def _pad_positions(positions: Sequence[Tensor | None], length: int) -> Tensor | None:
    """Stack positions to [..., batch, length]; rows without any count from zero."""
    known = [value for value in positions if value is not None]
    if not known:
        return None
    default = torch.arange(length).expand(*known[0].shape[:-1], length)
    rows = []
    for value in positions:
        row = default.clone()
        if value is not None:
            width = min(length, value.shape[-1])
            row[..., :width] = value[..., :width]
        rows.append(row)
    return torch.stack(rows, dim=-2)


def _benign(
    samples: Sequence[Sample], config: SecurityTensorsConfig, device: torch.device
) -> Tensor:
    """Mark the samples whose loss is the KL to the undefended model."""
    is_kl = config.benign_loss == "kl"
    return torch.tensor([is_kl and s.set_name != "SA" for s in samples], device=device)


def _autocast(vlm: VLM, config: SecurityTensorsConfig) -> Any:
    return torch.autocast(vlm.device.type, torch.bfloat16, enabled=config.autocast == "bfloat16")
