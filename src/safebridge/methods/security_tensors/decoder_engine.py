"""The loss of a batch through the decoder alone, with all that is the same computed once."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from safebridge.data.sample import Sample, open_images
from safebridge.methods.security_tensors.cache import (
    TensorCache,
    describe_pictures,
    describe_run,
    hash_key,
)
from safebridge.methods.security_tensors.config import SecurityTensorsConfig
from safebridge.methods.security_tensors.insertion import (
    find_insertion_points,
    insert_columns,
    place_tokens,
    shift_positions,
)
from safebridge.methods.security_tensors.modules import SecurityTensorModule
from safebridge.methods.security_tensors.objective import answer_cross_entropy
from safebridge.methods.security_tensors.pixels import add_to_pictures
from safebridge.methods.security_tensors.prepare import Example, Prepared, run_to_decoder
from safebridge.methods.security_tensors.references import References
from safebridge.models.load import VLM
from safebridge.models.tokens import IGNORED_LABEL, encode

__all__ = ["DecoderEngine", "autocast", "mark_benign"]


@final
class DecoderEngine:
    """Runs the decoder on image features, and its head at answer tokens alone.

    A prefix sees only itself, so its keys and values are computed once per batch and
    shared by all rows; their gradients add up. Before virtual tokens that stand after the
    picture nothing depends on them, so its keys and values are computed once per fit. A
    visual tensor takes the vision tower into every step, once for each distinct picture.

    Args:
        vlm: The frozen model.
        samples: Samples with answers.
        config: Kind of tensor and of loss.
        module: The tensor that is trained.
        prepared: The samples' ids and image features.
        is_shared: Whether what is the same is computed once; False computes it in each row.
        cache: Where keys, values, pictures and the undefended model's answers are kept;
            None keeps them in memory.
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
        cache: TensorCache | None = None,
    ) -> None:
        self.vlm, self.samples, self.config, self.module = vlm, samples, config, module
        self.prepared, self.cache = prepared, cache or TensorCache()
        self.lengths = [len(example.input_ids) for example in prepared.examples]
        self.groups = [0] * len(samples)
        self.decoder: Any = vlm.layout.get(vlm.model, "language_model")
        self.head = vlm.layout.get(vlm.model, "lm_head")
        self.embed = vlm.layout.get(vlm.model, "embed_tokens")
        self.references = References(vlm, samples, config, self.cache)
        self._hidden_references: dict[int, Tensor] = {}
        self._inputs_of: dict[Hashable, str] = {}
        self._is_image_of: dict[Hashable, Tensor] = {}
        self.insertions = [_insertion(example, config.position) for example in prepared.examples]
        self.is_shared = is_shared and module.tokens is not None
        # What stands before the virtual tokens is constant only if its pictures are, and it
        # predicts nothing that is learnt only if no label stands there.
        self.is_headed = self.is_shared and module.pixels is None and all(
            bool(example.labels[: at + 1].eq(IGNORED_LABEL).all())
            for example, at in zip(prepared.examples, self.insertions, strict=True)
        )  # fmt: skip

    def losses(self, indices: Sequence[int]) -> Tensor:
        """Return one loss per sample, differentiable in the tensor.

        Args:
            indices: Any samples.
        """
        with autocast(self.vlm, self.config):
            batch = self._collate(indices)
            wanted = batch.labels.ne(IGNORED_LABEL)
            logits = self.head(self._hidden(batch)[wanted])
        rows = wanted.nonzero()[:, 0]
        losses = answer_cross_entropy(logits, batch.labels[wanted], rows, len(indices))
        is_benign = mark_benign([self.samples[i] for i in indices], self.config, losses.device)
        if is_benign.any():
            own = is_benign[rows]

            def ask() -> Tensor:
                with autocast(self.vlm, self.config):
                    answer: Tensor = self.head(self._reference(indices, wanted)[own])
                return answer

            kl = self.references.divergences(indices, logits[own], rows[own], ask)
            losses = torch.where(is_benign, kl, losses)
        return losses

    def _collate(self, indices: Sequence[int], *, is_defended: bool = True) -> "_Batch":
        """Pad to the right; the last token predicts nothing, so it is left out."""
        examples = [self.prepared.examples[index] for index in indices]
        starts = [self.insertions[index] if self.is_headed else 0 for index in indices]
        parts = [_tail(example, at) for example, at in zip(examples, starts, strict=True)]
        ids = _pad([part.input_ids for part in parts])
        labels = _pad([part.labels for part in parts], IGNORED_LABEL)
        is_image = _pad([part.is_image for part in parts])
        mask = _pad([torch.ones_like(part.input_ids) for part in parts])
        device = self.vlm.device
        with torch.no_grad():
            # An image id may lie outside the embedding; what it gives is replaced anyway.
            embeddings = self.embed(ids.masked_fill(is_image, 0).to(device))
        pictures = [part.picture for part in parts if part.is_image.any()]
        if pictures:
            features = self._features(pictures, is_defended=is_defended)
            flat = torch.cat([features[picture] for picture in pictures])
            embeddings = embeddings.masked_scatter(
                is_image[..., None].to(device), flat.to(device, embeddings.dtype)
            )
        heads = self._heads(indices, starts) if any(starts) else None
        at = find_insertion_points(is_image.long(), mask, self.config.position, image_token_id=1)
        positions = _pad_positions(
            [part.position_ids for part in parts], starts, ids.shape[1], is_needed=heads is not None
        )
        is_text_defended = self.config.applies_to == "all"
        seen = torch.tensor([is_text_defended or bool(e.is_image.any()) for e in examples])
        return _Batch(
            embeddings,
            mask.to(device),
            labels.to(device),
            None if positions is None else positions.to(device),
            at.to(device),
            seen.to(device),
            heads,
        )

    def _features(
        self, pictures: Sequence[Hashable], *, is_defended: bool
    ) -> dict[Hashable, Tensor]:
        """Return the decoder's input at the image tokens of each distinct set of pictures."""
        distinct = dict.fromkeys(pictures)
        if self.module.pixels is None or not is_defended:
            return {picture: self.prepared.features[picture] for picture in distinct}
        groups: dict[Any, list[Hashable]] = {}
        for picture in distinct:
            shapes = {k: tuple(v.shape) for k, v in self._picture_inputs(picture).items()}
            groups.setdefault(tuple(sorted(shapes.items())), []).append(picture)
        features: dict[Hashable, Tensor] = {}
        for group in groups.values():
            rows = [self._picture_inputs(picture) for picture in group]
            inputs = {
                name: torch.cat([row[name] for row in rows]).to(self.vlm.device) for name in rows[0]
            }
            changed = add_to_pictures(self.vlm, inputs, self.module.pixels)
            arguments = run_to_decoder(self.vlm, changed)
            assert arguments is not None  # noqa: S101 - the same model was prepared that way
            for picture, merged in zip(group, arguments["inputs_embeds"], strict=True):
                features[picture] = merged[self._is_image_of[picture].to(merged.device)]
        return features

    def _picture_inputs(self, picture: Hashable) -> dict[str, Tensor]:
        """Return the model's inputs for one set of pictures with a prompt of no matter."""
        sample = self.samples[self.prepared.leaders[picture]]
        if picture not in self._inputs_of:
            # Where features depend on the prompt, the key does as well; elsewhere one prompt
            # for all gives rows of one length, which need no padding.
            is_read = self.vlm.layout.family == "instructblip"
            prompt = sample.prompt if is_read else self.samples[0].prompt
            key = hash_key(
                "pictures",
                [self.vlm.fingerprint, str(self.vlm.dtype), prompt],
                describe_pictures(sample),
            )
            if key not in self.cache:
                encoded = encode(self.vlm, [prompt], [open_images(sample)])
                self.cache.put(key, {**encoded.inputs, "is_image": encoded.spans.image})
            self._inputs_of[picture] = key
            self._is_image_of[picture] = self.cache.get(key)["is_image"][0]
        stored = self.cache.get(self._inputs_of[picture])
        return {name: value for name, value in stored.items() if name != "is_image"}

    def _hidden(self, batch: "_Batch") -> Tensor:
        """Run the decoder with the virtual tokens; return the original positions."""
        if self.module.tokens is None:
            return self._decode(batch.embeddings, batch.mask, batch.position_ids)
        tokens = self.module.tokens.to(batch.embeddings.dtype)
        n, size = tokens.shape[0], batch.embeddings.shape[0]
        if batch.heads is not None:
            return self._after_heads(tokens, batch, batch.heads)
        mask = insert_columns(batch.mask, batch.at, n, batch.is_defended)
        positions = batch.position_ids
        if positions is not None:
            positions = shift_positions(positions, batch.at, n)
        if self.is_shared and not bool(batch.at.any()):
            cache = self._prefix_cache(tokens, positions, size)
            positions = None if positions is None else positions[..., n:]
            return self._decode(batch.embeddings, mask, positions, cache)
        opened = insert_columns(batch.embeddings, batch.at, n, 0)
        hidden = self._decode(place_tokens(opened, tokens, batch.at), mask, positions)
        columns = torch.arange(batch.mask.shape[1], device=hidden.device)
        source = columns + n * (columns >= batch.at[:, None])
        return hidden[torch.arange(size, device=hidden.device)[:, None], source]

    def _after_heads(self, tokens: Tensor, batch: "_Batch", heads: "_Heads") -> Tensor:
        """Run virtual tokens and what follows them on the keys and values before them."""
        n, size = tokens.shape[0], batch.embeddings.shape[0]
        start = torch.zeros(size, dtype=torch.long, device=batch.mask.device)
        opened = insert_columns(batch.mask, start, n, batch.is_defended)
        mask = torch.cat([heads.mask, opened], dim=1)
        assert batch.position_ids is not None  # noqa: S101 - heads come with positions
        positions = shift_positions(batch.position_ids, start, n)
        embeddings = torch.cat([tokens.expand(size, -1, -1), batch.embeddings], dim=1)
        return self._decode(embeddings, mask, positions, heads.to_cache())[:, n:]

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

    def _heads(self, indices: Sequence[int], lengths: Sequence[int]) -> "_Heads":
        """Return the keys and values before the virtual tokens, padded to the left."""
        device, longest = self.vlm.device, max(lengths)
        keys = [
            self._head_key(index) if length else None
            for index, length in zip(indices, lengths, strict=True)
        ]
        self._run_heads(
            {key: index for key, index in zip(keys, indices, strict=True)
             if key is not None and key not in self.cache}
        )  # fmt: skip
        rows = [None if key is None else self.cache.get(key)["states"] for key in keys]
        first = next(row for row in rows if row is not None)
        states = first.new_zeros(len(rows), *first.shape[:3], longest, first.shape[-1])
        for state, row in zip(states, rows, strict=True):
            if row is not None:
                state[..., longest - row.shape[-2] :, :] = row
        columns = torch.arange(longest)[None, :]
        mask = (columns >= longest - torch.tensor(lengths)[:, None]).long()
        return _Heads(states.to(device), mask.to(device))

    def _head_key(self, index: int) -> str:
        """Name what stands before the virtual tokens; all samples that share it compute it once."""
        example, at = self.prepared.examples[index], self.insertions[index]
        sample, positions = self.samples[index], example.position_ids
        return hash_key(
            "heads",
            describe_run(self.vlm, self.config),
            example.input_ids[:at].tolist(),
            None if positions is None else positions[..., :at].tolist(),
            describe_pictures(sample),
            str(example.picture[1:]) if isinstance(example.picture, tuple) else "",
        )

    @torch.no_grad()
    def _run_heads(self, wanted: Mapping[str, int]) -> None:
        """Keep [layers, 2, heads, columns, head_dim] of each head; those of one length together."""
        lengths: dict[int, list[tuple[str, int]]] = {}
        for key, index in wanted.items():
            lengths.setdefault(self.insertions[index], []).append((key, index))
        for at, group in lengths.items():
            examples = [self.prepared.examples[index] for _, index in group]
            cache = DynamicCache()
            with autocast(self.vlm, self.config):
                embeddings = torch.stack([self._embed_head(example, at) for example in examples])
                positions = [
                    x.position_ids[..., :at] for x in examples if x.position_ids is not None
                ]
                self._decode(
                    embeddings,
                    embeddings.new_ones(embeddings.shape[:2], dtype=torch.long),
                    torch.stack(positions, dim=-2).to(self.vlm.device) if positions else None,
                    cache,
                )
            for row, (key, _) in enumerate(group):
                states = [torch.stack([x.keys[row], x.values[row]]) for x in cache.layers]
                self.cache.put(key, {"states": torch.stack(states)})

    def _embed_head(self, example: Example, at: int) -> Tensor:
        device, is_image = self.vlm.device, example.is_image[:at].to(self.vlm.device)
        embeddings = self.embed(example.input_ids[:at].to(device).masked_fill(is_image, 0))
        features = self.prepared.features[example.picture].to(device, embeddings.dtype)
        filled: Tensor = embeddings.masked_scatter(is_image[:, None], features)
        return filled

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

    def _reference(self, indices: Sequence[int], wanted: Tensor) -> Tensor:
        """Return the undefended model's hidden states at the answer tokens, kept after first use.

        They are as exact as its distribution and smaller by vocabulary over width.
        """
        if any(index not in self._hidden_references for index in indices):
            batch = self._collate(indices, is_defended=False)
            mask, cache = batch.mask, None
            if batch.heads is not None:
                mask, cache = torch.cat([batch.heads.mask, mask], dim=1), batch.heads.to_cache()
            hidden = self._decode(batch.embeddings, mask, batch.position_ids, cache)
            for row, index in enumerate(indices):
                self._hidden_references[index] = hidden[row, wanted[row]].cpu()
        stored = [self._hidden_references[index] for index in indices]
        if self.config.kl_top_k:  # what is kept of them stands in the cache
            self._hidden_references.clear()
        return torch.cat(stored).to(self.vlm.device)


@dataclass(frozen=True)
class _Heads:
    """Keys and values of what stands before the virtual tokens, and where they are padding."""

    states: Tensor
    mask: Tensor

    def to_cache(self) -> DynamicCache:
        return DynamicCache(
            [(self.states[:, layer, 0], self.states[:, layer, 1])
             for layer in range(self.states.shape[1])]
        )  # fmt: skip


@dataclass(frozen=True)
class _Batch:
    """Padded inputs of the decoder, and labels moved one to the left."""

    embeddings: Tensor
    mask: Tensor
    labels: Tensor
    position_ids: Tensor | None
    at: Tensor
    is_defended: Tensor
    heads: _Heads | None


def autocast(vlm: VLM, config: SecurityTensorsConfig) -> Any:
    """Return the context of the configured arithmetic.

    Args:
        vlm: The model, for its device.
        config: "none" or "bfloat16".
    """
    return torch.autocast(vlm.device.type, torch.bfloat16, enabled=config.autocast == "bfloat16")


def mark_benign(
    samples: Sequence[Sample], config: SecurityTensorsConfig, device: torch.device
) -> Tensor:
    """Mark the samples whose loss is the KL to the undefended model.

    Args:
        samples: The samples of a batch.
        config: Which loss benign samples have.
        device: Where the mark goes.
    """
    is_kl = config.benign_loss == "kl"
    return torch.tensor([is_kl and s.set_name != "SA" for s in samples], device=device)


def _insertion(example: Example, position: str) -> int:
    """Return how many tokens stand before the virtual ones."""
    if position == "prefix" or not bool(example.is_image.any()):
        return 0
    return int(example.is_image.nonzero().max()) + 1


def _tail(example: Example, start: int) -> Example:
    """Return what the decoder is given from a token on, and labels moved one to the left."""
    positions = example.position_ids
    return Example(
        input_ids=example.input_ids[start:-1],
        labels=example.labels[start + 1 :],
        is_image=example.is_image[start:-1],
        picture=example.picture,
        position_ids=None if positions is None else positions[..., start:-1],
    )


def _pad(rows: Sequence[Tensor], fill: int = 0) -> Tensor:
    return pad_sequence(list(rows), batch_first=True, padding_value=fill)


def _pad_positions(
    positions: Sequence[Tensor | None], starts: Sequence[int], length: int, *, is_needed: bool
) -> Tensor | None:
    """Stack positions to [..., batch, length]; rows without any count from their start."""
    known = [value for value in positions if value is not None]
    if not known and not is_needed:
        return None
    axes = known[0].shape[:-1] if known else ()
    rows = []
    for value, start in zip(positions, starts, strict=True):
        row = torch.arange(start, start + length).expand(*axes, length).clone()
        if value is not None:
            width = min(length, value.shape[-1])
            row[..., :width] = value[..., :width]
        rows.append(row)
    return torch.stack(rows, dim=-2)
