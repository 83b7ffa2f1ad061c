"""Where refusing begins: the layers at which a refusal's first word comes up, and their causes."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Final, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from safebridge.data.sample import Sample, open_images
from safebridge.errors import DataError, SettingError
from safebridge.methods.text_guided_alignment.states import (
    capture_layers,
    capture_text_states,
    shorten_logits,
)
from safebridge.models.generate import answer_encoded, generate_answers
from safebridge.models.hooks import is_preliminary
from safebridge.models.load import VLM
from safebridge.models.tokens import encode

__all__ = [
    "REFUSAL_WORDS",
    "ActivationReport",
    "ActivationRow",
    "InterventionRow",
    "bypass_layers",
    "find_layer_words",
    "find_refusal_tokens",
    "measure_activation_layers",
    "measure_bypass",
    "measure_replacement",
    "replace_image_states",
]

REFUSAL_WORDS: Final = ("sorry", "Sorry", "I", "Unfortunately", "As", "No")
"""First words of refusals; the authors' code knows "sorry" and "I" alone."""


@final
@dataclass(frozen=True)
class ActivationRow:
    """Where refusing begins and is decided in one request; layers count from 0."""

    id: str
    """The sample's id."""

    paper_start: int | None
    """First layer in which a refusal word's probability grows by the largest factor of all
    words; None if there is none."""

    repository_start: int | None
    """First layer in which one is among the words whose probability grows by the largest
    difference; None if there is none."""

    end: int | None
    """Last layer from `repository_start` on in which one is the likeliest word; None if there is
    none."""

    is_refusal: bool
    """Whether the model's answer begins with a refusal word."""


@final
@dataclass(frozen=True)
class ActivationReport:
    """What `measure_activation_layers` found."""

    rows: tuple[ActivationRow, ...]
    """One row for each sample."""

    refusal_probability: tuple[float, ...]
    """Mean probability of all refusal words after each layer."""

    refusal_tokens: tuple[int, ...]
    """The tokens that count as refusal words."""

    def summary(self) -> dict[str, dict[str, Any]]:
        """Count layers by criterion; samples that were never activated are counted apart.

        Returns:
            For each criterion `layers` (layer to number of samples), `median` (of the
            activated samples alone, None without any), `activated` and `never`.
        """
        found: dict[str, dict[str, Any]] = {}
        for name in ("paper_start", "repository_start", "end"):
            values = [getattr(row, name) for row in self.rows]
            layers = [value for value in values if value is not None]
            found[name] = {
                "layers": dict(sorted(Counter(layers).items())),
                "median": median(layers) if layers else None,
                "activated": len(layers),
                "never": len(values) - len(layers),
            }
        return found

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {**asdict(self), "summary": self.summary()}


@final
@dataclass(frozen=True)
class InterventionRow:
    """How often the model refused while something was changed in it."""

    layers: tuple[int, ...]
    """The layers that were changed; empty for the model as it is."""

    refused: tuple[bool, ...]
    """Whether it refused, for each sample."""

    @property
    def refusal_rate(self) -> float:
        """The share of refusals, in [0, 1]."""
        return sum(self.refused) / len(self.refused)


def find_refusal_tokens(tokenizer: Any, words: Sequence[str] = REFUSAL_WORDS) -> tuple[int, ...]:
    """Return the tokens that words begin with, at the start of a text and after a space.

    Args:
        tokenizer: The model's tokenizer.
        words: First words of refusals.

    Returns:
        Token ids in rising order.

    Raises:
        DataError: If no word has a token with a letter in it.
    """
    found = set()
    for word in words:
        for text in (word, f" {word}"):
            for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
                # Some tokenizers write the space as a token of its own before the word's.
                if any(letter.isalpha() for letter in tokenizer.decode([token])):
                    found.add(int(token))
                    break
    if not found:
        raise DataError(f"the tokenizer knows none of the words {', '.join(words)}. Pass others.")
    return tuple(sorted(found))


def find_layer_words(
    probabilities: Float[Tensor, "states vocab"],
    refusal_tokens: Sequence[int],
    *,
    floor: float = 1e-4,
    top: int = 5,
) -> tuple[int | None, int | None, int | None]:
    r"""Apply both criteria to the word distributions of one request.

    Args:
        probabilities: Distributions of the next word, of the embedding first and then after
            each layer.
        refusal_tokens: The tokens that count as refusal words.
        floor: Words below this probability after a layer do not compete in that layer's
            log-ratio; without it the rarest words win, whose ratios are noise. Ours.
        top: How many words count as growing the most in the second criterion.

    Returns:
        Three layers counted from 0, None where there is none: the first in which a refusal
        word has the largest $\log(P^j / P^{j-1})$; the first in which one is among the
        `top` of $P^j - P^{j-1}$ and does grow; and the last from there on in which one is
        the likeliest.

    Source:
        Xu et al. 2024 (arXiv:2410.12662) for the log-ratio; their repository for the
        differences with top 5 and the end. It skips the first layer, we do not.
    """
    words = torch.tensor(list(refusal_tokens), device=probabilities.device)
    before, after = probabilities[:-1].double(), probabilities[1:].double()
    ratio = after.log() - before.clamp(min=torch.finfo(torch.float64).tiny).log()
    ratio = ratio.masked_fill(after < floor, -torch.inf)
    by_ratio = torch.isin(ratio.argmax(dim=1), words) & (ratio.amax(dim=1) > 0)
    growth = after - before
    best = growth.topk(min(top, growth.shape[1]), dim=1)
    by_difference = (torch.isin(best.indices, words) & (best.values > 0)).any(dim=1)
    is_likeliest = torch.isin(after.argmax(dim=1), words)
    start = _first(by_difference)
    decided = [] if start is None else is_likeliest.nonzero()[:, 0].tolist()
    later = [layer for layer in decided if start is not None and layer >= start]
    return _first(by_ratio), start, later[-1] if later else None


@torch.no_grad()
def measure_activation_layers(
    vlm: VLM,
    samples: Sequence[Sample],
    *,
    refusal_tokens: Sequence[int] | None = None,
    floor: float = 1e-4,
    top: int = 5,
    batch_size: int = 8,
) -> ActivationReport:
    """Locate the layers at which a refusal's first word comes up at the end of the prompt.

    After every layer, the final norm and the head turn the last position's residual stream
    into a distribution of the next word. The norm is applied once at every depth, the last
    included, and what the head adds to its product, such as a soft cap, is left out.

    Args:
        vlm: The model; with an applied method, the model as defended.
        samples: Requests; for the paper's question harmful ones in text that are refused.
        refusal_tokens: First words of refusals; None takes `find_refusal_tokens`.
        floor: As in `find_layer_words`.
        top: As in `find_layer_words`.
        batch_size: Requests in one pass.

    Returns:
        A row for each sample, never-activated ones with None, and the mean probability of a
        refusal word by layer.

    Raises:
        DataError: If there are no samples.
    """
    if not samples:
        raise DataError("no samples to look at. Pass requests, best some that the model refuses.")
    tokens = tuple(refusal_tokens or find_refusal_tokens(vlm.tokenizer))
    norm, head = (vlm.layout.get(vlm.model, place) for place in ("final_norm", "lm_head"))
    rows: dict[int, ActivationRow] = {}
    total = torch.zeros(vlm.layout.num_layers, dtype=torch.float64)
    for chunk in _chunks(samples, batch_size):
        part = [samples[number] for number in chunk]
        encoded = encode(vlm, [s.prompt for s in part], [open_images(s) for s in part])
        with _capture_stream(vlm) as stream:
            logits = vlm.model(**encoded.inputs, use_cache=False, **shorten_logits(vlm, 1)).logits
        for place, number in enumerate(chunk):
            # One request at a time, because layers x vocabulary is large.
            states = torch.stack([state[place, -1].to(vlm.device) for state in stream])
            shares = head(norm(states)).float().softmax(dim=-1)
            starts = find_layer_words(shares, tokens, floor=floor, top=top)
            first_word = int(logits[place, -1].argmax())
            rows[number] = ActivationRow(samples[number].id, *starts, first_word in tokens)
            total += shares[1:, list(tokens)].sum(dim=1).double().cpu()
    means = tuple((total / len(samples)).tolist())
    return ActivationReport(tuple(rows[number] for number in sorted(rows)), means, tokens)


@contextmanager
def bypass_layers(vlm: VLM, layers: Sequence[int]) -> Iterator[None]:
    """Let decoder layers pass on what they were given, while the context is open.

    They still run, so that caches keep their shape; their output is thrown away.

    Args:
        vlm: The model; given back as it was, also on an error.
        layers: Layers from 0; negative numbers count from the end.

    Yields:
        Nothing.

    Source:
        The switch `cut_flow_layers` of the authors' repository does this.
    """

    def skip(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    with ExitStack() as stack:
        for layer in sorted({vlm.layout.layer_index(layer) for layer in layers}):
            module = vlm.layout.layer(vlm.model, layer)
            stack.callback(module.register_forward_hook(skip, with_kwargs=True).remove)
        yield


@contextmanager
def replace_image_states(
    vlm: VLM,
    layer: int,
    states: Float[Tensor, "batch hidden"],
    image_mask: Bool[Tensor, "batch seq"],
) -> Iterator[None]:
    """Write one state over all image tokens after a layer, while the context is open.

    Only passes over the whole prompt are changed, so that a cached continuation goes on
    from the changed prompt.

    Args:
        vlm: The model; given back as it was, also on an error.
        layer: Layer from 0; negative numbers count from the end.
        states: What each row's image tokens become, e.g. its caption's mean state.
        image_mask: True at image tokens, `spans.image` of the prompt.

    Yields:
        Nothing.
    """

    def write(_module: Any, _args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.shape[:2] != image_mask.shape:
            return None
        mask = image_mask.to(hidden.device)[..., None]
        new = torch.where(mask, states.to(hidden.device, hidden.dtype)[:, None], hidden)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = vlm.layout.layer(vlm.model, layer).register_forward_hook(write)
    try:
        yield
    finally:
        handle.remove()


def measure_bypass(
    vlm: VLM,
    samples: Sequence[Sample],
    is_refusal: Callable[[str], bool],
    *,
    width: int = 3,
    stride: int = 1,
    max_new_tokens: int = 20,
    batch_size: int = 16,
) -> list[InterventionRow]:
    """Let the model answer while a window of layers is bypassed, for every place of the window.

    Where refusals stop, the window holds layers that refusing needs; where the answers
    become unreadable, it holds layers that everything needs, so look at both.

    Args:
        vlm: The model.
        samples: Requests, best such that the model refuses.
        is_refusal: Judge of an answer.
        width: Layers in a window.
        stride: Layers from one window to the next.
        max_new_tokens: Longest answer in tokens.
        batch_size: Requests answered together.

    Returns:
        First the model as it is, then one row for each window.

    Raises:
        SettingError: If the window does not fit the model.
    """
    if not 1 <= width <= vlm.layout.num_layers or stride < 1:
        raise SettingError(
            f"a window of {width} layers, moved by {stride}, does not fit the "
            f"{vlm.layout.num_layers} layers of {vlm.name}. Choose width and stride from 1 up."
        )
    starts = range(0, vlm.layout.num_layers - width + 1, stride)
    windows = [(), *(tuple(range(start, start + width)) for start in starts)]
    prompts, images = [s.prompt for s in samples], [open_images(s) for s in samples]
    rows = []
    for window in windows:
        with bypass_layers(vlm, window):
            answers = generate_answers(
                vlm, prompts, images, max_new_tokens=max_new_tokens, batch_size=batch_size
            )
        rows.append(InterventionRow(window, tuple(is_refusal(answer) for answer in answers)))
    return rows


def measure_replacement(
    vlm: VLM,
    samples: Sequence[Sample],
    is_refusal: Callable[[str], bool],
    *,
    layers: Sequence[int] | None = None,
    max_new_tokens: int = 20,
    batch_size: int = 8,
) -> list[InterventionRow]:
    """Let the model answer while its image tokens hold their caption's mean state.

    If refusals appear, the states of the picture were what kept them away, and a layer at
    which they appear is one in which aligning them can help.

    Args:
        vlm: The model.
        samples: Requests with pictures and captions.
        is_refusal: Judge of an answer.
        layers: Layers to try, one at a time; None tries all.
        max_new_tokens: Longest answer in tokens.
        batch_size: Requests answered together.

    Returns:
        First the model as it is, then one row for each layer.

    Raises:
        DataError: If a sample lacks a picture or a caption.
    """
    for sample in samples:
        if not sample.images or not sample.caption:
            raise DataError(
                f"sample '{sample.id}' needs a picture and a caption, whose state replaces it."
            )
    wanted = range(vlm.layout.num_layers) if layers is None else layers
    numbers = [vlm.layout.layer_index(layer) for layer in wanted]
    refused: dict[tuple[int, ...], dict[int, bool]] = {(): {}} | {(n,): {} for n in numbers}
    for chunk in _chunks(samples, batch_size):
        part = [samples[number] for number in chunk]
        captions = capture_text_states(vlm, [s.caption for s in part], sorted(set(numbers)))
        states = dict(zip(sorted(set(numbers)), captions, strict=True))
        for layer, answers in _answer_replaced(vlm, part, states, max_new_tokens):
            verdicts = map(is_refusal, answers)
            refused[layer].update(zip(chunk, verdicts, strict=True))
    return [
        InterventionRow(layer, tuple(own[number] for number in sorted(own)))
        for layer, own in refused.items()
    ]


@torch.inference_mode()
def _answer_replaced(
    vlm: VLM, samples: Sequence[Sample], states: Mapping[int, Tensor], max_new_tokens: int
) -> Iterator[tuple[tuple[int, ...], list[str]]]:
    """Yield the answers of a batch, as they are and with each replacement."""
    encoded = encode(
        vlm, [s.prompt for s in samples], [open_images(s) for s in samples], padding_side="left"
    )
    for layer in (None, *states):
        with ExitStack() as stack:
            if layer is not None:
                stack.enter_context(
                    replace_image_states(vlm, layer, states[layer], encoded.spans.image)
                )
            answers = answer_encoded(vlm, encoded, max_new_tokens)
        yield () if layer is None else (layer,), answers


@contextmanager
def _capture_stream(vlm: VLM) -> Iterator[list[Tensor]]:
    """Collect the input of the first layer and the output of every layer of one pass."""

    def keep(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not is_preliminary():
            stream.append(args[0] if args else kwargs["hidden_states"])

    first = vlm.layout.layer(vlm.model, 0)
    handle = first.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with capture_layers(vlm, range(vlm.layout.num_layers)) as stream:
            yield stream
    finally:
        handle.remove()


def _first(flags: Bool[Tensor, " layers"]) -> int | None:
    places = flags.nonzero()[:, 0]
    return int(places[0]) if len(places) else None


def _chunks(samples: Sequence[Sample], size: int) -> Iterator[list[int]]:
    """Yield numbers of samples with equally many pictures, up to `size` at a time."""
    groups: dict[int, list[int]] = {}
    for number, sample in enumerate(samples):
        groups.setdefault(len(sample.images), []).append(number)
    for group in groups.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]
