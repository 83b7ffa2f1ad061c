"""Puts a security tensor into a model's own `forward` and `generate`, and takes it out again."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from safebridge.errors import SafebridgeError, SettingError
from safebridge.methods.security_tensors.insertion import (
    extend_inputs,
    find_insertion_points,
    insert_columns,
    mark_columns,
    place_tokens,
    remove_columns,
)
from safebridge.methods.security_tensors.pixels import add_to_pictures
from safebridge.models.hooks import name_arguments, replace_method, set_on_instance
from safebridge.models.load import VLM

__all__ = ["apply_tensors"]

_MARK: Final = "_safebridge_security_tensor"
_PLAIN_INPUTS: Final = frozenset(
    {
        "attention_mask",
        "cache_position",
        "inputs_embeds",
        "logits_to_keep",  # meant for the head, and passed on by some
        "past_key_values",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)
"""What a decoder may be called with for its prefix to be taken from keys and values."""


@contextmanager
def apply_tensors(
    vlm: VLM,
    *,
    tokens: Tensor | None,
    pixels: Tensor | None,
    position: str = "prefix",
    applies_to: str = "all",
    strength: float = 1.0,
) -> Iterator[None]:
    """Defend `vlm.model(...)` and `vlm.model.generate(...)` while the context is open.

    No weight is touched: the model's instance gets a `forward` and a `generate` of its
    own, and its embedding a hook. The token sequence gets n more columns before the model
    sees it, so position ids, masks and caches follow from the model's own rules, and the
    results come back without these columns (attention maps alone keep them).

    Args:
        vlm: The model to defend.
        tokens: Virtual tokens [n, hidden], or None.
        pixels: Tensor added to preprocessed pictures, or None.
        position: "prefix" or "after_image".
        applies_to: "all", or "pictures" for no virtual tokens in requests without a picture.
        strength: 0 leaves the model alone. Pixels are scaled by it. A virtual token weighs
            in every softmax of the attention as if there were `strength` copies of it:
            log(strength) is added to its attention logits, which at 1 is nothing and
            towards 0 makes the tokens invisible.

    Yields:
        Nothing; afterwards the model is as before, also on an error.

    Raises:
        SettingError: If `strength` is negative or no number, or a model without image tokens
            is to be defended for pictures alone.
        SafebridgeError: If a security tensor is already applied to this model.
    """
    if not (strength >= 0 and math.isfinite(strength)):
        raise SettingError(f"strength={strength} must be 0 (off) or above; 1 is as fitted.")
    if _MARK in vlm.model.__dict__:
        raise SafebridgeError(
            "a security tensor is already applied to this model. Leave its `with` block first, or "
            'fit one tensor with modality="both".'
        )
    if strength == 0 or (tokens is None and pixels is None):
        yield
        return
    if applies_to == "pictures" and tokens is not None and vlm.layout.image_token_id is None:
        raise SettingError(
            f"{vlm.name} marks no pictures in its prompts, so applies_to='pictures' finds none. "
            "Use applies_to='all'."
        )
    application = _Application(
        vlm, tokens, pixels, position=position, applies_to=applies_to, strength=strength
    )
    with ExitStack() as stack:
        stack.enter_context(set_on_instance(vlm.model, _MARK, value=True))
        stack.enter_context(replace_method(vlm.model, "forward", application.forward))
        stack.enter_context(replace_method(vlm.model, "generate", application.generate))
        if tokens is not None and position == "prefix" and strength == 1:
            decoder = vlm.layout.get(vlm.model, "language_model")
            stack.enter_context(replace_method(decoder, "forward", application.decode))
        for handle in application.register_hooks():
            stack.callback(handle.remove)
        yield


@dataclass(frozen=True)
class _Columns:
    """Where the virtual tokens stand in the sequences of one call."""

    at: Tensor
    """First virtual column of each row."""

    length: int
    """Columns of the prompt with the virtual ones."""

    is_seen: Tensor
    """Which rows see their virtual tokens."""

    start: int | None = None
    """Column that the running forward pass begins at; None between passes."""

    def rows(self, batch: int) -> Tensor:
        """Return `at` for a batch that beams or several returned sequences enlarged."""
        return self.at.repeat_interleave(batch // self.at.shape[0])


@final
class _Application:
    """The state of one `with` block: what is inserted and where it stands just now."""

    def __init__(
        self,
        vlm: VLM,
        tokens: Tensor | None,
        pixels: Tensor | None,
        *,
        position: str,
        applies_to: str,
        strength: float,
    ) -> None:
        self.vlm = vlm
        self.tokens = tokens
        self.pixels = pixels
        self.position = position
        self.applies_to = applies_to
        self.strength = strength
        self.n = 0 if tokens is None else tokens.shape[0]
        self.columns: _Columns | None = None
        self.is_generating = False
        self.prefilled: WeakKeyDictionary[Any, _Columns] = WeakKeyDictionary()
        self.prefix: list[tuple[Tensor, Tensor]] | None = None

    def register_hooks(self) -> Iterator[Any]:
        """Register the hooks that place the tokens and, if needed, weigh them."""
        if self.tokens is None:
            return
        layout, model = self.vlm.layout, self.vlm.model
        yield layout.get(model, "embed_tokens").register_forward_hook(self._embed)
        if self.strength == 1:
            return
        for layer in set(range(layout.num_layers)) - set(layout.cross_attention_layers):
            attention = layout.in_layer(model, layer, "attention")
            yield attention.register_forward_pre_hook(self._weigh, with_kwargs=True)

    def forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run one forward pass with the security tensor in it."""
        inputs = name_arguments(original, args, kwargs)
        past = _cached_length(inputs.get("past_key_values"))
        if self.is_generating:  # `generate` has prepared the inputs already
            with self._at(self.columns and replace(self.columns, start=past)):
                return original(**inputs)
        inputs = self._change_pixels(inputs)
        if past and self.tokens is not None:
            return self._continue(original, inputs, past)
        return self._begin(original, inputs) if self._is_due(inputs) else original(**inputs)

    def generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Generate with the security tensor in the prompt."""
        inputs = name_arguments(original, args, kwargs)
        prompt = inputs.pop("inputs", None)
        if prompt is not None:
            inputs["input_ids"] = prompt
        inputs = self._change_pixels(inputs)
        columns = None
        if self._is_due(inputs):
            inputs = self._lengthen(original, inputs)
            columns, inputs = self._open(inputs)
        self.is_generating = True
        try:
            with self._at(columns):
                output = original(**inputs)
        finally:
            self.is_generating = False
        return output if columns is None else self._close(output, columns, inputs["input_ids"])

    def decode(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the decoder; a prefix that it has seen before comes from its keys and values."""
        inputs = name_arguments(original, args, kwargs)
        if not self._can_reuse_prefix(inputs):
            return original(**inputs)
        n, embeddings, cache = self.n, inputs["inputs_embeds"], inputs["past_key_values"]
        if self.prefix is None:
            own = DynamicCache()
            original(inputs_embeds=embeddings[:1, :n], past_key_values=own, use_cache=True)
            self.prefix = [(layer.keys, layer.values) for layer in own.layers]
        for number, states in enumerate(self.prefix):
            cache.update(*(each.expand(len(embeddings), -1, -1, -1) for each in states), number)
        shorter = dict(inputs, inputs_embeds=embeddings[:, n:])
        for name in ("position_ids", "cache_position"):
            if isinstance(inputs.get(name), Tensor):
                shorter[name] = inputs[name][..., n:]
        output = original(**shorter)
        hidden = output.last_hidden_state
        # What a prefix would give is cut off again; zeros keep the columns in their places.
        gap = hidden.new_zeros(hidden.shape[0], n, hidden.shape[2])
        output["last_hidden_state"] = torch.cat([gap, hidden], dim=1)
        return output

    def _can_reuse_prefix(self, inputs: dict[str, Any]) -> bool:
        """Return whether a call is a prompt whose first n columns are the prefix and nothing else.

        Left padding stands before the prefix of its row, and some decoders take more than
        embeddings, a mask and positions; both take the plain way.
        """
        columns, cache = self.columns, inputs.get("past_key_values")
        embeddings, mask = inputs.get("inputs_embeds"), inputs.get("attention_mask")
        positions = inputs.get("position_ids")
        wanted = torch.arange(self.n, device=self.vlm.device)
        return (
            columns is not None
            and columns.start == 0
            and not torch.is_grad_enabled()
            and isinstance(embeddings, Tensor)
            and embeddings.shape[1] == columns.length > self.n
            and not bool(columns.at.any())
            and type(cache) is DynamicCache
            and _cached_length(cache) == 0
            and (mask is None or (isinstance(mask, Tensor) and mask.ndim == 2))  # noqa: PLR2004 - batch, seq
            and (positions is None or bool((positions[..., : self.n] == wanted).all()))
            and not any(
                value is not None and value is not False
                for name, value in inputs.items()
                if name not in _PLAIN_INPUTS
            )
        )

    @contextmanager
    def _at(self, columns: _Columns | None) -> Iterator[None]:
        before, self.columns = self.columns, columns
        try:
            yield
        finally:
            self.columns = before

    def _change_pixels(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if self.pixels is None:
            return inputs
        return add_to_pictures(self.vlm, inputs, self.pixels, strength=self.strength)

    def _is_due(self, inputs: dict[str, Any]) -> bool:
        """Return whether any row of a prompt gets virtual tokens."""
        if self.tokens is None:
            return False
        ids = inputs.get("input_ids")
        return ids is None or bool(self._find_defended(ids).any())

    def _find_defended(self, input_ids: Tensor) -> Tensor:
        """Return which rows see the virtual tokens, as 0 and 1."""
        image_token_id = self.vlm.layout.image_token_id
        if self.applies_to == "all" or image_token_id is None:
            return torch.ones_like(input_ids[:, 0])
        return input_ids.eq(image_token_id).any(dim=1).long()

    def _open(self, inputs: dict[str, Any]) -> tuple[_Columns, dict[str, Any]]:
        """Open the virtual columns in the inputs of a prompt."""
        input_ids = inputs.get("input_ids")
        if input_ids is None:
            raise SettingError(
                "a textual tensor needs input_ids. Call the model with the processor's output, not "
                "with inputs_embeds."
            )
        mask = inputs.get("attention_mask")
        cache = inputs.get("past_key_values")
        known = None if cache is None else self.prefilled.get(cache)
        if known is not None:
            at, is_seen = known.at, known.is_seen
        else:
            is_seen = self._find_defended(input_ids)
            at = find_insertion_points(
                input_ids,
                torch.ones_like(input_ids) if mask is None else mask,
                self.position,
                self.vlm.layout.image_token_id,
            )
        inputs = extend_inputs(inputs, at, self.n, self.vlm.layout.image_token_id, is_seen=is_seen)
        return _Columns(at, inputs["input_ids"].shape[1], is_seen), inputs

    def _begin(self, original: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        """Run a prompt and give its outputs back at the original positions."""
        is_tuple = inputs.pop("return_dict", None) is False
        kept = inputs.get("logits_to_keep", 0)
        columns, inputs = self._open(inputs)
        if isinstance(kept, int) and kept:
            inputs["logits_to_keep"] = kept + self.n
        elif not isinstance(kept, int):
            inputs["logits_to_keep"] = 0
        with self._at(replace(columns, start=0)):
            output = original(**inputs, return_dict=True) if is_tuple else original(**inputs)
        if output.get("past_key_values") is not None:
            self.prefilled[output.past_key_values] = columns
        output["logits"] = self._pick_logits(output.logits, columns, kept)
        if output.get("hidden_states") is not None:
            output["hidden_states"] = tuple(
                remove_columns(hidden, columns.at, self.n) for hidden in output.hidden_states
            )
        return output.to_tuple() if is_tuple else output

    def _pick_logits(self, logits: Tensor, columns: _Columns, kept: int | Tensor) -> Tensor:
        """Select the logits of the columns that the caller asked for."""
        seq = columns.length - self.n
        wanted = torch.arange(seq, device=logits.device)
        wanted = wanted[kept] if isinstance(kept, Tensor) else wanted[-kept:]
        at = columns.at.to(logits.device)[:, None]
        source = wanted + self.n * (wanted >= at) - (columns.length - logits.shape[1])
        return logits[torch.arange(logits.shape[0], device=logits.device)[:, None], source]

    def _continue(self, original: Callable[..., Any], inputs: dict[str, Any], past: int) -> Any:
        """Run tokens after a cached prompt, in whose cache the virtual tokens are."""
        known = self.prefilled.get(inputs["past_key_values"])
        if known is None:  # prefilled before this context was opened: not ours to change
            return original(**inputs)
        at = known.at
        given = inputs.get("input_ids", inputs.get("inputs_embeds"))
        before = past - self.n + (0 if given is None else given.shape[1])
        inputs = dict(inputs)
        for name, fill in (("attention_mask", known.is_seen), ("cross_attention_mask", 0)):
            value = inputs.get(name)
            if isinstance(value, Tensor) and value.shape[1] == before:
                inputs[name] = insert_columns(value, at, self.n, fill)
        if isinstance(inputs.get("position_ids"), Tensor):
            inputs["position_ids"] = inputs["position_ids"] + self.n
        columns = replace(known, length=before + self.n, start=past)
        with self._at(columns):
            return original(**inputs)

    def _lengthen(self, original: Callable[..., Any], inputs: dict[str, Any]) -> dict[str, Any]:
        """Raise limits on the total length by the virtual tokens, which the caller never sees."""
        inputs = dict(inputs)
        config = inputs.get("generation_config")
        if config is not None:
            inputs["generation_config"] = config = copy.deepcopy(config)
        own = getattr(getattr(original, "__self__", None), "generation_config", None)
        for name in ("max_length", "min_length"):
            if inputs.get(name) is not None:
                inputs[name] += self.n
            elif getattr(config, name, None):
                setattr(config, name, getattr(config, name) + self.n)
            elif getattr(own, name, None) and inputs.get(name.replace("_", "_new_")) is None:
                new = getattr(config, "max_new_tokens", None) or inputs.get("max_new_tokens")
                if name == "min_length" or new is None:
                    inputs[name] = getattr(own, name) + self.n
        return inputs

    def _close(self, output: Any, columns: _Columns, prompt: Tensor) -> Any:
        """Take the virtual columns out of what `generate` returned."""
        is_tensor = isinstance(output, Tensor)
        sequences: Tensor = output if is_tensor else output.sequences
        at = columns.rows(sequences.shape[0]).to(sequences.device)
        start = sequences[:, : columns.length]
        rows = prompt.to(sequences.device).repeat_interleave(at.shape[0] // prompt.shape[0], dim=0)
        if start.shape == rows.shape and bool((start == rows).all()):
            sequences = remove_columns(sequences, at, self.n)
        if is_tensor:
            return sequences
        output["sequences"] = sequences
        if output.get("past_key_values") is not None:
            is_seen = columns.is_seen.repeat_interleave(len(at) // len(columns.is_seen))
            self.prefilled[output.past_key_values] = replace(columns, at=at, is_seen=is_seen)
        return output

    def _embed(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        """Place the virtual tokens over their columns in the embedding's output."""
        columns, tokens = self.columns, self.tokens
        if columns is None or tokens is None or output.ndim != 3:  # noqa: PLR2004 - one id alone
            return None
        start = columns.start
        if start is None:
            # Some models embed the prompt in `generate` itself, before any forward pass.
            if output.shape[1] != columns.length:
                return None
            start = 0
        return place_tokens(output, tokens, columns.rows(output.shape[0]), start)

    def _weigh(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Add log(strength) to the attention logits of the virtual tokens."""
        if self.columns is None:
            return None
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        batch, queries = hidden.shape[:2]
        keys, offset = queries, 0
        cache = kwargs.get("past_key_values")
        if cache is not None:
            keys, offset = cache.get_mask_sizes(queries, getattr(module, "layer_idx", 0))
        at = self.columns.rows(batch).to(hidden.device) - offset
        bias = mark_columns(at, self.n, keys)[:, None, None, :] * math.log(self.strength)
        mask = _with_bias(kwargs.get("attention_mask"), bias.to(hidden.dtype), queries)
        return args, kwargs | {"attention_mask": mask}


def _with_bias(mask: Any, bias: Tensor, queries: int) -> Tensor:
    """Add a bias over keys to an attention mask of any dense form."""
    lowest = torch.finfo(bias.dtype).min
    keys = bias.shape[-1]
    if mask is None:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=bias.device)
        mask = mask.tril(diagonal=keys - queries)[None, None]
    if not isinstance(mask, Tensor) or mask.ndim != bias.ndim:
        raise SettingError(
            "a strength other than 0 and 1 needs dense attention masks. Load the model with "
            'attn_implementation="sdpa" or "eager".'
        )
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, lowest)
    return (mask + bias).clamp(min=lowest)


def _cached_length(cache: Any) -> int:
    return 0 if cache is None else int(cache.get_seq_length())
