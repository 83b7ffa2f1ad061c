"""Pure functions that open n columns in a batch of token sequences and close them again."""

from collections.abc import Mapping
from typing import Any, Final

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from safebridge.errors import SettingError

__all__ = [
    "extend_inputs",
    "find_insertion_points",
    "insert_columns",
    "mark_columns",
    "place_tokens",
    "remove_columns",
    "shift_positions",
]

_FILLS: Final = {
    "token_type_ids": 0,  # they are text
    "mm_token_type_ids": 0,  # they are text
    "labels": -100,  # they are never a target
    "cross_attention_mask": 0,  # they look at no picture, as in the authors' code
}
"""Inputs with one column per token, and what a virtual token's column holds."""


def find_insertion_points(
    input_ids: Int[Tensor, "batch seq"],
    attention_mask: Shaped[Tensor, "batch seq"],
    position: str,
    image_token_id: int | None,
) -> Int[Tensor, " batch"]:
    """Find the column before which each row takes its virtual tokens.

    Args:
        input_ids: Token ids, padded on either side.
        attention_mask: Nonzero at real tokens.
        position: "prefix" is before the first real token; "after_image" is after the last
            image token, or the prefix in a row without any.
        image_token_id: The id that marks image positions.

    Returns:
        One column per row, from 0 to the sequence length.
    """
    first = attention_mask.ne(0).int().argmax(dim=1)
    if position == "prefix" or image_token_id is None:
        return first
    columns = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
    last = (input_ids.eq(image_token_id) * columns).amax(dim=1)
    return torch.where(last > 0, last, first)


def mark_columns(at: Int[Tensor, " batch"], n: int, length: int) -> Bool[Tensor, "batch columns"]:
    """Mark the n columns from `at` on in rows of `length` columns.

    Args:
        at: First marked column of each row.
        n: Number of marked columns.
        length: Columns of the result.
    """
    columns = torch.arange(length, device=at.device)[None, :] - at[:, None]
    return (columns >= 0) & (columns < n)


def insert_columns(
    values: Shaped[Tensor, "batch seq ..."],
    at: Int[Tensor, " batch"],
    n: int,
    fill: int | Shaped[Tensor, " batch"],
) -> Shaped[Tensor, "batch longer ..."]:
    """Insert n columns before column `at` of each row.

    Args:
        values: Any tensor with rows and columns first.
        at: The column of each row.
        n: How many columns to insert.
        fill: What they hold, one number for all rows or one for each.

    Returns:
        A new tensor with n more columns.
    """
    batch, seq = values.shape[:2]
    row_fill = torch.as_tensor(fill, dtype=values.dtype, device=values.device).expand(batch)
    new = row_fill.view(batch, 1, *[1] * (values.ndim - 2)).expand(batch, n, *values.shape[2:])
    joined = torch.cat([values, new], dim=1)
    columns = torch.arange(seq + n, device=values.device)[None, :]
    start = at.to(values.device)[:, None]
    inside = columns - start
    source = torch.where(inside < 0, columns, torch.where(inside < n, seq + inside, columns - n))
    rows = torch.arange(batch, device=values.device)[:, None]
    return joined[rows, source]


def remove_columns(
    values: Shaped[Tensor, "batch longer ..."], at: Int[Tensor, " batch"], n: int
) -> Shaped[Tensor, "batch seq ..."]:
    """Take out the n columns from `at` on in each row; undoes `insert_columns`.

    Args:
        values: Any tensor with rows and columns first.
        at: The first column to take out in each row.
        n: How many.
    """
    columns = torch.arange(values.shape[1] - n, device=values.device)[None, :]
    source = columns + n * (columns >= at.to(values.device)[:, None])
    return values[torch.arange(values.shape[0], device=values.device)[:, None], source]


def place_tokens(
    embeddings: Float[Tensor, "batch seq hidden"],
    tokens: Float[Tensor, "n hidden"],
    at: Int[Tensor, " batch"],
    start: int = 0,
) -> Float[Tensor, "batch seq hidden"]:
    """Put the virtual tokens over the columns that were opened for them.

    Args:
        embeddings: Token embeddings, or a stretch of them.
        tokens: The textual tensor; it is cast to the type of the embeddings.
        at: First virtual column of each row, counted in the whole sequence.
        start: Column of the whole sequence that the stretch begins at.

    Returns:
        A new tensor, differentiable with respect to both arguments.
    """
    n = tokens.shape[0]
    columns = torch.arange(embeddings.shape[1], device=embeddings.device)[None, :] + start
    inside = columns - at.to(embeddings.device)[:, None]
    is_virtual = (inside >= 0) & (inside < n)
    virtual = tokens.to(embeddings.device, embeddings.dtype)[inside.clamp(0, n - 1)]
    return torch.where(is_virtual[..., None], virtual, embeddings)


def shift_positions(
    position_ids: Int[Tensor, "*axes seq"], at: Int[Tensor, " batch"], n: int
) -> Int[Tensor, "*axes longer"]:
    """Open n consecutive positions before column `at` and move what follows by n.

    Args:
        position_ids: Position of each token, [batch, seq] or [axes, batch, seq] (M-RoPE).
        at: The column of each row.
        n: How many positions to open.
    """
    if position_ids.ndim > 2:  # noqa: PLR2004 - one plane of positions per M-RoPE axis
        return torch.stack([shift_positions(plane, at, n) for plane in position_ids])
    start = at.to(position_ids.device)[:, None]
    rows = position_ids.expand(at.shape[0], -1)
    columns = torch.arange(rows.shape[1], device=rows.device)[None, :]
    moved = rows + n * (columns >= start)
    # The first virtual token takes the position of the token it stands before.
    here = rows.gather(1, start.clamp(max=rows.shape[1] - 1)) + (start >= rows.shape[1])
    opened = insert_columns(moved, at, n, 0)
    longer = torch.arange(opened.shape[1], device=rows.device)[None, :]
    return torch.where(mark_columns(start[:, 0], n, opened.shape[1]), here + longer - start, opened)


def extend_inputs(
    inputs: Mapping[str, Any],
    at: Int[Tensor, " batch"],
    n: int,
    image_token_id: int | None,
    *,
    is_seen: Int[Tensor, " batch"] | int = 1,
) -> dict[str, Any]:
    """Open n columns for virtual tokens in every input that has one column per token.

    The opened columns of `input_ids` repeat the last text token of the same row, so that
    a repetition penalty sees no token it would not have seen.

    Args:
        inputs: Keyword arguments of a model, with `input_ids`; they stay as they are.
        at: The column of each row.
        n: Number of virtual tokens.
        image_token_id: The id that marks image positions.
        is_seen: 0 hides the virtual tokens of a row, as padding; one number for all rows or
            one for each.

    Returns:
        The arguments with n more columns; inputs without columns are passed on.

    Raises:
        SettingError: If the attention mask is not two-dimensional.
    """
    input_ids = inputs["input_ids"]
    seq = input_ids.shape[1]
    mask = inputs.get("attention_mask")
    if mask is None:
        mask = torch.ones_like(input_ids)
    if not isinstance(mask, Tensor) or mask.ndim != 2:  # noqa: PLR2004 - batch and seq
        raise SettingError("a textual tensor needs an attention_mask of shape [batch, seq].")
    extended = dict(inputs)
    is_text = mask.ne(0) & input_ids.ne(-1 if image_token_id is None else image_token_id)
    last = (is_text * torch.arange(seq, device=input_ids.device)).argmax(dim=1, keepdim=True)
    extended["input_ids"] = insert_columns(input_ids, at, n, input_ids.gather(1, last)[:, 0])
    extended["attention_mask"] = insert_columns(mask, at, n, is_seen)
    for name, fill in _FILLS.items():
        value = inputs.get(name)
        if isinstance(value, Tensor) and value.shape[1] == seq:
            extended[name] = insert_columns(value, at, n, fill)
    if isinstance(inputs.get("position_ids"), Tensor):
        extended["position_ids"] = shift_positions(inputs["position_ids"], at, n)
    return extended
