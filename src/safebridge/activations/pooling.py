"""Pools activations the moment they are computed, and stops a pass when all are there."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import product

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from safebridge.activations.sites import hook_place
from safebridge.models.hooks import is_preliminary
from safebridge.models.load import VLM

__all__ = ["AllSeenError", "Site", "answer_weights", "last_one", "pool_places"]

Site = tuple[str, int]
"""A place and a layer."""


class AllSeenError(Exception):
    """Ends a forward pass when nothing that comes is wanted."""


@contextmanager
def pool_places(
    vlm: VLM, weights: Tensor, places: Sequence[str], layers: Sequence[int]
) -> Iterator[dict[Site, Tensor]]:
    """Pool what flows through the places of the layers while the context is open.

    Args:
        vlm: The model.
        weights: Weight of each column of each row, adding up to 1; from the end of the sequence.
        places: Which places.
        layers: Which decoder layers, from 0.

    Yields:
        Pooled states by place and layer, float32, as they come.

    Raises:
        AllSeenError: In the forward pass, as soon as nothing that comes is wanted.
    """
    found: dict[Site, Tensor] = {}
    wanted = len(places) * len(layers)
    # Columns are counted from the end, so tokens that a defense puts before them do not matter.
    is_one = bool((weights > 0).sum(dim=1).max() == 1)
    from_end = weights.shape[1] - weights.argmax(dim=1)

    def keep(site: Site, hidden: Tensor) -> None:
        if is_preliminary():
            return
        if is_one:
            rows = torch.arange(hidden.shape[0], device=hidden.device)
            state = hidden[rows, hidden.shape[1] - from_end.to(hidden.device)].float()
        else:
            own = hidden[:, -weights.shape[1] :].float()
            state = torch.einsum("bs,bsw->bw", weights.to(own.device), own)
        found[site] = state
        if len(found) == wanted:
            raise AllSeenError

    with ExitStack() as stack:
        for site in product(places, layers):
            stack.callback(hook_place(vlm, *site, partial(keep, site)).remove)
        yield found


def last_one(mask: Bool[Tensor, "batch seq"]) -> Float[Tensor, "batch seq"]:
    """Weigh the last marked column of each row.

    Args:
        mask: Marked columns.
    """
    columns = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    last = (mask * columns).amax(dim=1) - 1
    return torch.nn.functional.one_hot(last, mask.shape[1]).float()


def answer_weights(
    answer: Bool[Tensor, "batch seq"], *, is_mean: bool
) -> Float[Tensor, "batch seq"]:
    """Weigh the answer's own tokens; an answer of one token keeps its end-of-turn token.

    Args:
        answer: True at the answer's tokens, the end-of-turn token included.
        is_mean: Weigh all of them alike instead of the last one alone.
    """
    end = last_one(answer).bool()
    own = answer & ~(end & (answer.sum(dim=1, keepdim=True) > 1))
    if not is_mean:
        return last_one(own)
    return own.float() / own.sum(dim=1, keepdim=True)
