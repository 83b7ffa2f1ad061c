"""At which tokens a revision acts, exact under padding, caches, beams, chunks and speculation."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final, final
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from safebridge.errors import SafebridgeError, SettingError
from safebridge.models.hooks import name_arguments, replace_method
from safebridge.models.load import VLM

__all__ = ["SCOPES", "ScopeTracker", "TokenScope", "mark_tokens"]

SCOPES: Final = (
    "last_and_decode",
    "decode_only",
    "all",
    "prompt",
    "image",
    "text",
    "last_k",
)
"""`last_and_decode`: the last prompt token and every generated one (ITI). `decode_only`: every
generated token. `all`: every token. `prompt`: the prompt's. `image`: its image tokens. `text`:
all but these, generated tokens included. `last_k`: the prompt's last tokens alone."""

_OF_ANSWER: Final = ("last_and_decode", "decode_only", "all", "text")
_OF_IMAGE: Final = ("image", "text")
_OF_END: Final = ("last_and_decode", "last_k")


@final
@dataclass(frozen=True)
class TokenScope:
    """A named choice of tokens.

    Raises:
        SettingError: If the name is unknown or the count is not positive.
    """

    name: str = "last_and_decode"
    """One of `SCOPES`."""

    count: int = 1
    """How many tokens at the prompt's end "last_and_decode" and "last_k" take."""

    def __post_init__(self) -> None:
        """Check name and count."""
        if self.name not in SCOPES:
            raise SettingError(f"scope={self.name!r} is unknown. Choose {', '.join(SCOPES)}.")
        if self.count < 1:
            raise SettingError(f"scope_tokens={self.count} must be at least 1.")

    @property
    def has_answer(self) -> bool:
        """Whether generated tokens are in it."""
        return self.name in _OF_ANSWER

    @property
    def needs_ids(self) -> bool:
        """Whether it depends on where the image tokens are."""
        return self.name in _OF_IMAGE


def mark_tokens(
    scope: TokenScope,
    is_real: Bool[Tensor, "batch seq"],
    is_image: Bool[Tensor, "batch seq"],
    answer_start: Int[Tensor, " batch"],
) -> Bool[Tensor, "batch seq"]:
    """Mark the tokens of a scope in whole sequences.

    Args:
        scope: Which tokens.
        is_real: False at padding, which may be on either side.
        is_image: True at image tokens.
        answer_start: First column of each row's answer: the sequence length for a prompt alone,
            more if the prompt goes on after these columns.

    Returns:
        True where the revision acts.
    """
    columns = torch.arange(is_real.shape[1], device=is_real.device)
    is_prompt = is_real & (columns < answer_start[:, None])
    is_answer = is_real & ~is_prompt
    to_come = (answer_start - is_real.shape[1]).clamp(min=0)[:, None]
    from_end = is_prompt.long().flip(1).cumsum(1).flip(1) + to_come
    is_end = is_prompt & (from_end <= scope.count)
    marks = {
        "all": is_real,
        "prompt": is_prompt,
        "decode_only": is_answer,
        "last_and_decode": is_end | is_answer,
        "last_k": is_end,
        "image": is_prompt & is_image,
        "text": is_real & ~is_image,
    }
    return marks[scope.name]


@dataclass(frozen=True)
class _Prompt:
    """What is known of the sequences that are being run."""

    mask: Tensor
    """True in scope [rows, columns]; what comes after these columns is generated."""

    is_open: Tensor | None
    """Whether each row's gate is open [rows]; None without a gate."""


@final
class ScopeTracker:
    """Knows for every running forward pass at which of its tokens to revise.

    A token's place is its column in the whole sequence, counted from the length of the cache,
    never "the last one of this call". So a prompt fed in chunks, one that is recomputed without
    a cache, candidates of speculative decoding and beams all get the same treatment.

    Args:
        vlm: The model.
        scope: Which tokens.
        gate: Returns for the inputs of a prompt whether each row is revised at all.
        answer_start: First answer column of each row, to score given answers as if they had
            been generated; None takes what a forward pass gets for a prompt.
    """

    def __init__(
        self,
        vlm: VLM,
        scope: TokenScope,
        *,
        gate: Callable[[Callable[..., Any], Mapping[str, Any], Tensor], Tensor] | None = None,
        answer_start: Tensor | None = None,
    ) -> None:
        self.mask: Tensor | bool = False
        self._vlm, self._scope, self._gate = vlm, scope, gate
        self._answer_start = answer_start
        self._prompt: _Prompt | None = None
        self._is_generating = False
        self._expected: int | None = None
        self._forward: Callable[..., Any] = vlm.model.forward
        self._known: WeakKeyDictionary[Any, _Prompt] = WeakKeyDictionary()

    def install(self, stack: ExitStack) -> None:
        """Follow the model's `forward` and `generate` until the stack is closed."""
        model = self._vlm.model
        if self._scope.name == "all" and self._gate is None:
            self.mask = True  # nothing to find out
            return
        stack.enter_context(replace_method(model, "forward", self._run_forward))
        stack.enter_context(replace_method(model, "generate", self._run_generate))
        decoder = self._vlm.layout.get(model, "language_model")
        handle = decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True)
        stack.callback(handle.remove)

    def _run_forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run one forward pass of the model."""
        inputs = name_arguments(original, args, kwargs)
        given = _first_given(inputs)
        self._expected = None if given is None else given.shape[1]
        if self._is_generating:
            return original(**inputs)
        self._prompt = self._read_call(inputs, given)
        try:
            output = original(**inputs)
        finally:
            prompt, self._prompt, self._expected = self._prompt, None, None
        self._remember(output, prompt)
        return output

    def _run_generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Generate; the prompt is what `generate` was given."""
        inputs = name_arguments(original, args, kwargs)
        prompt = inputs.pop("inputs", None)
        if prompt is not None:
            inputs["input_ids"] = prompt
        given = _first_given(inputs)
        if given is not None:
            known = self._recall(inputs.get("past_key_values"))
            self._prompt = self._read_prompt(inputs, given, known=known)
        self._is_generating = True
        try:
            output = original(**inputs)
        finally:
            self._is_generating = False
            found, self._prompt, self._expected = self._prompt, None, None
        self._remember(output, found)
        return output

    def _read_call(self, inputs: Mapping[str, Any], given: Tensor | None) -> _Prompt | None:
        """Return what a call of `forward` says about its sequences."""
        cache = inputs.get("past_key_values")
        past = _cached_length(cache)
        known = self._recall(cache) if past else None
        # A cache that was filled before this block was opened: all that comes now is an answer.
        if given is None or (past and known is None):
            return None
        if past == 0:
            return self._read_prompt(inputs, given, answer_start=self._answer_start)
        if known is None or self._answer_start is None:
            return known
        more = self._read_prompt(
            inputs, given, known=known, answer_start=self._answer_start, past=past
        )
        return _Prompt(torch.cat([known.mask[:, :past], more.mask], dim=1), known.is_open)

    def _recall(self, cache: Any) -> _Prompt | None:
        return None if cache is None else self._known.get(cache)

    def _remember(self, output: Any, prompt: _Prompt | None) -> None:
        """Keep what belongs to a cache, for a later pass that continues it."""
        cache = getattr(output, "past_key_values", None)
        if cache is not None and prompt is not None:
            self._known[cache] = prompt

    def _read_prompt(
        self,
        inputs: Mapping[str, Any],
        given: Tensor,
        *,
        known: _Prompt | None = None,
        answer_start: Tensor | None = None,
        past: int = 0,
    ) -> _Prompt:
        """Mark the scope in the tokens of one call, which follow `past` cached ones."""
        is_real = _real_tokens(inputs.get("attention_mask"), given)
        is_real = is_real[:, -given.shape[1] :] if past else is_real
        rows, columns = is_real.shape
        start = torch.full((rows,), columns) if answer_start is None else answer_start - past
        start = start.to(is_real.device)
        is_image = self._image_tokens(inputs, is_real)
        is_open = None if known is None else known.is_open
        if self._gate is not None and is_open is None:
            is_prompt = is_real & (torch.arange(columns, device=start.device) < start[:, None])
            if bool((start > columns).any()):
                raise SettingError(
                    "a gate has to see the whole prompt. Pass it in one call, or to `generate`."
                )
            is_open = self._gate(self._forward, inputs, is_prompt)
        return _Prompt(mark_tokens(self._scope, is_real, is_image, start), is_open)

    def _image_tokens(self, inputs: Mapping[str, Any], is_real: Tensor) -> Tensor:
        if not self._scope.needs_ids:
            return torch.zeros_like(is_real)
        ids, token = inputs.get("input_ids"), self._vlm.layout.image_token_id
        if ids is None or token is None:
            raise SettingError(
                f"scope='{self._scope.name}' has to see the image tokens. Call the model with "
                "input_ids, not with inputs_embeds, or use another scope."
            )
        found = torch.zeros_like(is_real)
        found[:, is_real.shape[1] - ids.shape[1] :] = ids == token
        return found

    def _before_decoder(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Find the mask of the decoder pass that starts now."""
        inputs = name_arguments(module.forward, args, kwargs) if args else kwargs
        given = inputs.get("inputs_embeds")
        given = inputs["input_ids"] if given is None else given
        rows, seq = given.shape[:2]
        if self._expected is not None and seq != self._expected:
            raise SafebridgeError(
                f"the model was called with {self._expected} tokens, but its decoder gets {seq}: "
                "something else inserts tokens. Apply the revision first and the method that "
                "inserts tokens inside its `with` block."
            )
        start = _cached_length(inputs.get("past_key_values"))
        prompt = self._prompt
        if prompt is None and start == 0 and self._gate is None:  # the decoder was called alone
            prompt = self._read_prompt(inputs, given)
        self.mask = self._find_mask(prompt, start, rows, seq)

    def _find_mask(self, prompt: _Prompt | None, start: int, rows: int, seq: int) -> Tensor | bool:
        has_answer = self._scope.has_answer
        if prompt is None:
            return has_answer and self._gate is None
        mask: Tensor | bool = has_answer
        known = prompt.mask[:, start : start + seq]
        if known.shape[1]:
            rest = known.new_full((known.shape[0], seq - known.shape[1]), has_answer)
            mask = torch.cat([known, rest], dim=1)
        if prompt.is_open is not None and mask is not False:
            mask = prompt.is_open[:, None] & mask
        if isinstance(mask, bool):
            return mask
        return mask.repeat_interleave(rows // mask.shape[0], dim=0)[..., None]


def _first_given(inputs: Mapping[str, Any]) -> Tensor | None:
    """Return the tensor whose second axis is the sequence."""
    ids = inputs.get("input_ids")
    found = inputs.get("inputs_embeds") if ids is None else ids
    return found if isinstance(found, torch.Tensor) else None


def _real_tokens(mask: Any, given: Tensor) -> Tensor:
    """Return where there are tokens, cached ones included; another mask tells nothing."""
    rows, seq = given.shape[:2]
    is_flat = isinstance(mask, torch.Tensor) and mask.ndim == 2  # noqa: PLR2004 - rows, columns
    if is_flat and mask.shape[0] == rows and mask.shape[1] >= seq:
        return torch.as_tensor(mask.to(given.device).bool())
    return torch.ones(rows, seq, dtype=torch.bool, device=given.device)


def _cached_length(cache: Any) -> int:
    return 0 if cache is None else int(cache.get_seq_length())
