"""Adds fitted vectors to a model's activations while a context is open, and nothing after it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from safebridge.activations.gate import Gate, read_gate
from safebridge.activations.scopes import ScopeTracker, TokenScope
from safebridge.activations.sites import hook_place, place_shape
from safebridge.errors import SettingError, ShapeError
from safebridge.models.load import VLM

__all__ = ["NORM_GUARDS", "Edit", "apply_edits", "shift_activations"]

NORM_GUARDS: Final = ("none", "keep")
"""`none`: the vector is added. `keep`: afterwards each activation gets its old length back."""


@final
@dataclass(frozen=True, eq=False)
class Edit:
    """One vector that is added at one place of one layer."""

    place: str
    """One of `safebridge.activations.sites.PLACES`."""

    layer: int
    """Decoder layer from 0; -1 is the last."""

    shift: Float[Tensor, " width"]
    """What is added, in units of the activation; heads side by side for "heads"."""


@contextmanager
def apply_edits(
    vlm: VLM,
    edits: Sequence[Edit],
    *,
    scope: TokenScope | None = None,
    norm_guard: str = "none",
    gate: Gate | None = None,
    answer_start: Int[Tensor, " batch"] | None = None,
) -> Iterator[None]:
    """Revise activations of `vlm.model(...)` and `vlm.model.generate(...)` in a `with` block.

    No weight is touched. Which tokens are revised follows from their place in the whole
    sequence, so a padded batch equals its rows, and cached, chunked, beam and speculative
    decoding equal one pass over everything.

    Args:
        vlm: The model; given back bit for bit, also on an error.
        edits: What to add and where.
        scope: At which tokens; None is the last prompt token and every generated one.
        norm_guard: One of `NORM_GUARDS`.
        gate: Revise only the samples whose prompt opens it. It costs a pass over the prompt up
            to its layer.
        answer_start: First answer column of each row. With it a call of the model scores the
            answers that it was given as if they had been generated; without it a call's tokens
            are a prompt.

    Yields:
        Nothing.

    Raises:
        SettingError: If the norm guard is unknown.
        ShapeError: If a shift has another width than its place.
    """
    if norm_guard not in NORM_GUARDS:
        raise SettingError(
            f"norm_guard={norm_guard!r} is unknown. Choose {' or '.join(NORM_GUARDS)}."
        )
    for edit in edits:
        _check(vlm, edit)
    tracker = ScopeTracker(
        vlm,
        scope or TokenScope(),
        gate=None if gate is None else partial(read_gate, vlm, gate),
        answer_start=answer_start,
    )
    with ExitStack() as stack:
        tracker.install(stack)
        for edit in edits:
            parts = place_shape(vlm.layout, edit.place)[0] if edit.place == "heads" else 1
            guarded = parts if norm_guard == "keep" else 0
            hook = _shift_hook(tracker, edit.shift, guarded)
            stack.callback(hook_place(vlm, edit.place, edit.layer, hook).remove)
        yield


def shift_activations(
    hidden: Float[Tensor, "batch seq width"],
    shift: Float[Tensor, " width"],
    mask: Bool[Tensor, "batch #seq 1"] | None = None,
    *,
    guarded_parts: int = 0,
) -> Float[Tensor, "batch seq width"]:
    r"""Add a vector to the activations of chosen tokens.

    Computes $h' = h + m\,v$ out of place; with a norm guard $h' \cdot |h| / |h'|$ for each part.

    Args:
        hidden: Activations.
        shift: The vector $v$, in the dtype and on the device of `hidden`.
        mask: True at the tokens to revise; None is all of them.
        guarded_parts: Number of equal parts (heads) of the width that each get their old length
            back; 0 lets the length change.

    Returns:
        Revised activations; those of other tokens are bit for bit the same.
    """
    if not guarded_parts:
        return hidden + (shift if mask is None else mask * shift)
    new = (hidden + shift).unflatten(-1, (guarded_parts, -1))
    old = hidden.unflatten(-1, (guarded_parts, -1))
    length = torch.linalg.vector_norm(old, dim=-1, keepdim=True, dtype=torch.float32)
    grown = torch.linalg.vector_norm(new, dim=-1, keepdim=True, dtype=torch.float32)
    # A shift that cancels an activation has no direction left to stretch.
    factor = torch.where(grown > 0, length / grown, 1.0).to(new.dtype)
    kept = (new * factor).flatten(-2)
    return kept if mask is None else torch.where(mask, kept, hidden)


def _shift_hook(
    tracker: ScopeTracker, shift: Tensor, guarded: int
) -> Callable[[Tensor], Tensor | None]:
    """Return what a revised place is passed through."""

    def hook(hidden: Tensor) -> Tensor | None:
        nonlocal shift
        mask = tracker.mask
        if mask is False:
            return None
        if shift.dtype != hidden.dtype or shift.device != hidden.device:
            shift = shift.to(hidden.device, hidden.dtype)
        if mask is True:
            if not guarded:  # decoding takes this line once per layer and token
                return hidden + shift
            return shift_activations(hidden, shift, guarded_parts=guarded)
        return shift_activations(hidden, shift, mask.to(hidden.device), guarded_parts=guarded)

    return hook


def _check(vlm: VLM, edit: Edit) -> None:
    shape = place_shape(vlm.layout, edit.place)
    width = int(torch.tensor(shape).prod())
    if tuple(edit.shift.shape) != (width,):
        raise ShapeError(
            f"a shift of {tuple(edit.shift.shape)} features does not fit '{edit.place}' of "
            f"{vlm.name}, which has ({width},). Load the model it was fitted on, or fit again."
        )
