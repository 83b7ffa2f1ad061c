"""Where in the decoder safety separates: angles between prompts, layer by layer."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from safebridge.data.sample import Sample, open_images
from safebridge.demo.results import LayerCurve
from safebridge.errors import ShapeError
from safebridge.models.load import VLM
from safebridge.models.tokens import encode

__all__ = ["capture_last_states", "measure_angular_gap", "pairwise_angles"]


def capture_last_states(
    vlm: VLM, samples: Sequence[Sample], *, batch_size: int
) -> Float[Tensor, "layers n hidden"]:
    """Capture the residual stream after every decoder layer at the end of every prompt.

    Inside a method's `apply` these are the states of the defended model.

    Args:
        vlm: The model; it is as it was afterwards.
        samples: Requests, with or without pictures.
        batch_size: Requests in one forward pass.

    Returns:
        States in float32 on the CPU, in the order of the samples.
    """
    parts = []
    with torch.no_grad(), _last_states(vlm) as seen:
        for start in range(0, len(samples), batch_size):
            part = samples[start : start + batch_size]
            encoded = encode(vlm, [one.prompt for one in part], [open_images(one) for one in part])
            vlm.model(**encoded.inputs)
            parts.append(torch.stack(seen))
            seen.clear()
    return torch.cat(parts, dim=1)


@contextmanager
def _last_states(vlm: VLM) -> Iterator[list[Tensor]]:
    """Collect one state per decoder layer of a pass; rows are padded on the left."""
    states: list[Tensor] = []

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        # A copy of one position only: whole sequences of all layers would fill the memory.
        states.append(hidden[:, -1].detach().to("cpu", torch.float32, copy=True))

    with ExitStack() as stack:
        for index in range(vlm.layout.num_layers):
            hook = vlm.layout.layer(vlm.model, index).register_forward_hook(keep)
            stack.callback(hook.remove)
        yield states


def pairwise_angles(
    left: Float[Tensor, "layers n hidden"], right: Float[Tensor, "other_layers m other_hidden"]
) -> Float[Tensor, "layers n m"]:
    r"""Return the angle between every pair of prompts in every layer.

    Computes $\arccos \langle a, b \rangle / (|a| |b|)$ in float64: near 0 degrees the
    arccosine loses half of the digits, and half-precision products overflow.

    Args:
        left: States of one group of prompts.
        right: States of the other group.

    Returns:
        Angles in degrees, in [0, 180].

    Raises:
        ShapeError: If the two come from models of different depth or width.
    """
    if left.shape[0] != right.shape[0] or left.shape[2] != right.shape[2]:
        raise ShapeError(
            f"states of shape {tuple(left.shape)} and {tuple(right.shape)} come from different "
            "models; record both with the same one."
        )
    a = torch.nn.functional.normalize(left.double(), dim=-1)
    b = torch.nn.functional.normalize(right.double(), dim=-1)
    cosines = torch.einsum("lnh,lmh->lnm", a, b).clamp(-1.0, 1.0)
    return torch.rad2deg(torch.arccos(cosines)).float()


def measure_angular_gap(
    normal: Float[Tensor, "layers n hidden"],
    harmful: Float[Tensor, "other_layers m other_hidden"],
    *,
    name: str,
    draws: int = 200,
    seed: int = 0,
) -> LayerCurve:
    r"""Measure how much further harmful prompts lie from normal ones than these from each other.

    Per layer, $\overline{\angle(n, m)} - \overline{\angle(n, n')}$ over all pairs with
    $n \neq n'$. Zero means that the layer does not tell the two apart.

    Args:
        normal: States of harmless prompts, at least two.
        harmful: States of harmful prompts, at least one.
        name: Name of the curve.
        draws: Number of bootstrap draws over prompts.
        seed: Seed of these draws.

    Returns:
        The gap in degrees with a 95 % percentile band.

    Raises:
        ShapeError: If the states do not fit together or are too few.

    Source:
        Li et al. 2025, "Safety Layers in Aligned Large Language Models", section 3
        (arXiv:2408.17003). They average over 500 random pairs; we take all pairs, and
        the bootstrap draws prompts, because the pairs are not independent.
    """
    if normal.shape[1] < 2 or harmful.shape[1] < 1:  # noqa: PLR2004 - a pair has two
        raise ShapeError(
            f"an angular gap needs two normal prompts and one harmful one, found "
            f"{normal.shape[1]} and {harmful.shape[1]}; raise layer_samples."
        )
    across = pairwise_angles(normal, harmful)
    within = pairwise_angles(normal, normal)
    generator = torch.Generator().manual_seed(seed)
    n, m = normal.shape[1], harmful.shape[1]
    drawn = torch.stack(
        [
            _gap(
                across,
                within,
                torch.randint(n, (n,), generator=generator),
                torch.randint(m, (m,), generator=generator),
            )
            for _ in range(draws)
        ]
    )
    # A draw of one prompt only has no pair within; it says nothing about the band.
    drawn = drawn[drawn.isfinite().all(dim=1)]
    ends = torch.quantile(drawn, torch.tensor([0.025, 0.975]), dim=0)
    values = _gap(across, within, torch.arange(n), torch.arange(m))
    return LayerCurve(
        name, tuple(values.tolist()), tuple(ends[0].tolist()), tuple(ends[1].tolist()), min(n, m)
    )


def _gap(
    across: Float[Tensor, "layers n m"],
    within: Float[Tensor, "layers n n"],
    rows: Tensor,
    columns: Tensor,
) -> Float[Tensor, " layers"]:
    pairs: Bool[Tensor, "k k"] = rows[:, None] != rows[None, :]
    distances = within[:, rows][:, :, rows]
    inside = (distances * pairs).sum(dim=(1, 2)) / pairs.sum()
    return across[:, rows][:, :, columns].mean(dim=(1, 2)) - inside
