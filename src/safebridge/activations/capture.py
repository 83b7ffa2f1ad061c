"""Reads activations of many samples in one pass each: the wanted places, pooled at once."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from jaxtyping import Float
from torch import Tensor

from safebridge.activations.pooling import (
    AllSeenError,
    Site,
    answer_weights,
    last_one,
    pool_places,
)
from safebridge.activations.shared import can_share, pack_shared, run_shared
from safebridge.activations.sites import PLACES, find_layers, place_shape
from safebridge.data.sample import Sample, open_images
from safebridge.errors import DataError, SettingError, ShapeError, UnknownNameError
from safebridge.models.load import VLM
from safebridge.models.tokens import encode

__all__ = ["READ_POSITIONS", "Activations", "capture_activations", "capture_batches"]

READ_POSITIONS: Final = ("last_prompt_token", "last_response_token", "mean_response")
"""`last_prompt_token`: the last token before the answer, the template's included; no answer is
shown to the model. `last_response_token`: the answer's last own token, before the end-of-turn
token. `mean_response`: the mean over the answer's own tokens."""

_SAME_FLOAT32: Final = 1e-3
_SAME_HALF: Final = 5e-2  # bfloat16 keeps eight bits, and sums are in another order


@final
@dataclass(frozen=True, eq=False)
class Activations:
    """Activations of samples, in float32 on the CPU."""

    ids: tuple[str, ...]
    """Ids of the samples, one for each row."""

    layers: tuple[int, ...]
    """Decoder layers from 0, one for each index of the second axis."""

    tensors: Mapping[str, Tensor]
    """[n, layers, hidden] by place; "heads" is [n, layers, heads, head_dim]."""


def capture_activations(
    vlm: VLM,
    samples: Sequence[Sample],
    *,
    places: Sequence[str] = ("resid_out",),
    layers: Sequence[int] | None = None,
    read_position: str = "last_prompt_token",
    batch_size: int = 16,
    progress: Callable[[int], object] | None = None,
) -> Activations:
    """Read activations of samples with one forward pass each and no generation.

    Each place is pooled the moment it is computed, and the pass ends after the last wanted
    one, so memory grows with what is kept and nothing is computed in vain. Prompts with several
    answers are run once and their keys and values lent to all of them, where a check against a
    whole pass shows that this is the same. Inside a method's
    `apply` these are the activations of the defended model.

    Args:
        vlm: The model; it is as it was afterwards.
        samples: What to run, with answers unless `read_position` is "last_prompt_token".
        places: Which of `PLACES` to keep.
        layers: Which decoder layers; negative numbers count from the end. None is all that
            run: without a picture a model skips layers that attend to it.
        read_position: One of `READ_POSITIONS`.
        batch_size: Samples in one pass.
        progress: Called after each pass with the number of samples in it.

    Returns:
        One row for each sample, in their order.

    Raises:
        DataError: If there are no samples, or an answer is missing or empty.
        SettingError: If the read position is unknown.
        UnknownNameError: If a place is unknown.
        ShapeError: If there is no such layer, or the model skips it.
    """
    chosen = choose_layers(vlm, samples, layers)
    tensors = {
        place: torch.empty(len(samples), len(chosen), *place_shape(vlm.layout, place))
        for place in places
    }
    rows_of = capture_batches(
        vlm,
        samples,
        places=places,
        layers=chosen,
        read_position=read_position,
        batch_size=batch_size,
    )
    for rows, found in rows_of:
        for place in places:
            states = torch.stack([found[place, layer] for layer in chosen], dim=1)
            tensors[place][rows] = states.cpu().reshape(len(rows), *tensors[place].shape[1:])
        if progress is not None:
            progress(len(rows))
    return Activations(tuple(sample.id for sample in samples), chosen, tensors)


def choose_layers(
    vlm: VLM, samples: Sequence[Sample], layers: Sequence[int] | None
) -> tuple[int, ...]:
    """Return decoder layers from 0; None stands for all that run on these samples.

    Args:
        vlm: The model.
        samples: What will be run.
        layers: As the caller named them.
    """
    if layers is None:
        is_text_only = any(not sample.images for sample in samples)
        return find_layers(vlm, is_text_only=is_text_only)
    return tuple(vlm.layout.layer_index(layer) for layer in layers)


def capture_batches(
    vlm: VLM,
    samples: Sequence[Sample],
    *,
    places: Sequence[str],
    layers: Sequence[int],
    read_position: str,
    batch_size: int,
) -> Iterator[tuple[list[int], dict[Site, Float[Tensor, "batch width"]]]]:
    """Yield the pooled states of one batch after the other, rows of similar length together.

    Args:
        vlm: The model.
        samples: As in `capture_activations`.
        places: As in `capture_activations`.
        layers: Decoder layers from 0.
        read_position: One of `READ_POSITIONS`.
        batch_size: Samples in one pass.

    Yields:
        Numbers of the samples, and their states in float32 on the model's device by place and
        layer, heads side by side.
    """
    _check(samples, places, read_position, batch_size)
    has_answers = read_position != "last_prompt_token"
    is_mean = read_position == "mean_response"

    def run(part: Sequence[Sample]) -> dict[Site, Tensor]:
        encoded = encode(
            vlm,
            [sample.prompt for sample in part],
            [open_images(sample) for sample in part],
            [sample.answer or "" for sample in part] if has_answers else None,
            padding_side="left",
        )
        if has_answers:
            weights = answer_weights(encoded.spans.answer, is_mean=is_mean)
        else:
            weights = last_one(encoded.inputs["attention_mask"].bool())
        return _run(vlm, encoded.inputs, weights, places, layers)

    rest = list(range(len(samples)))
    if has_answers and can_share(vlm, samples):
        is_checked = False
        for rows in pack_shared(samples, 4 * batch_size):  # answers alone are short
            part = [samples[row] for row in rows]
            found = run_shared(vlm, part, places, layers, is_mean=is_mean)
            if found is not None and not is_checked:
                is_checked = _agree(found, run(part[:1]), vlm.dtype)
            if found is None or not is_checked:
                break
            rest = sorted(set(rest) - set(rows))
            yield rows, found
    for rows in _plan_batches(samples, rest, batch_size, has_answers=has_answers):
        yield rows, run([samples[row] for row in rows])


def _agree(found: Mapping[Site, Tensor], expected: Mapping[Site, Tensor], dtype: Any) -> bool:
    """Say whether the first row of what was found is the expected one, up to rounding."""
    limit = _SAME_FLOAT32 if dtype == torch.float32 else _SAME_HALF
    return all(
        float((found[site][0] - state[0]).norm()) <= limit * float(state[0].norm())
        for site, state in expected.items()
    )


def _run(
    vlm: VLM,
    inputs: Mapping[str, Any],
    weights: Tensor,
    places: Sequence[str],
    layers: Sequence[int],
) -> dict[Site, Tensor]:
    """Run one batch and return its pooled states."""
    with torch.no_grad(), pool_places(vlm, weights, places, layers) as found:
        try:
            vlm.model(**inputs, use_cache=False)
        except AllSeenError:
            return found
    missing = sorted({layer for layer in layers if any((p, layer) not in found for p in places)})
    if missing:
        raise ShapeError(
            f"{vlm.name} did not run decoder layers {missing}: without a picture it skips those "
            "that attend to it. Leave them out of layers=..., or give every sample a picture."
        )
    return found


def _plan_batches(
    samples: Sequence[Sample], chosen: Sequence[int], batch_size: int, *, has_answers: bool
) -> list[list[int]]:
    """Return row numbers in batches of one image count, longest texts first."""
    groups: dict[int, list[int]] = {}
    for row in chosen:
        groups.setdefault(len(samples[row].images), []).append(row)

    def length(row: int) -> int:
        own = samples[row]
        return len(own.prompt) + (len(own.answer or "") if has_answers else 0)

    batches = []
    for _, rows in sorted(groups.items(), reverse=True):
        rows.sort(key=length, reverse=True)
        batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    return batches


def _check(
    samples: Sequence[Sample], places: Sequence[str], read_position: str, batch_size: int
) -> None:
    if not samples:
        raise DataError("no samples to capture activations of. Pass at least one.")
    if not places:
        raise DataError(f"no places to capture. Name some of {', '.join(PLACES)}.")
    for place in places:
        if place not in PLACES:
            raise UnknownNameError("place", place, PLACES)
    if read_position not in READ_POSITIONS:
        raise SettingError(
            f"read_position={read_position!r} is unknown. Choose {', '.join(READ_POSITIONS)}."
        )
    if batch_size < 1:
        raise SettingError(f"batch_size={batch_size} must be at least 1.")
    if read_position == "last_prompt_token":
        return
    for sample in samples:
        if not (sample.answer or "").strip():
            raise DataError(
                f"sample '{sample.id}' has no answer to read '{read_position}' from. Give it one, "
                'or use read_position="last_prompt_token".'
            )
