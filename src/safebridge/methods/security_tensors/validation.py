"""Early stop by what a security tensor is for: refusals on harm, answers on everything else."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from safebridge.data.sample import Sample, open_images
from safebridge.errors import DataError
from safebridge.models.generate import generate_answers
from safebridge.models.load import VLM

if TYPE_CHECKING:
    from safebridge.methods.security_tensors.method import SecurityTensors

__all__ = ["HeldOutRates", "RateValidation", "split_by_picture"]


@final
@dataclass(frozen=True)
class HeldOutRates:
    """What a tensor did on held-out samples, as fractions."""

    harmless_rate: float
    """Share of harmful samples that were refused."""

    false_refusal_rates: dict[str, float]
    """Share of benign samples that were refused, by set."""

    score: float
    """The harmless rate less the weighted worst false refusal rate."""


@final
class RateValidation:
    """Scores a tensor by generated answers; pass it to `fit(..., validation=...)`.

    The score is the share of refusals on SA less the larger share of refusals among TCB and
    GB, so that neither refusing everything nor answering everything is worth anything. The
    paper stops by epoch count; this rule is ours.

    Args:
        vlm: The model that is fitted.
        samples: Held-out samples with their sets; their answers are not read.
        is_refusal: Whether an answer refuses.
        max_new_tokens: Longest answer; a refusal shows in its first words.
        batch_size: Samples that are answered together.
        false_refusal_weight: Factor of false refusals in the score.

    Raises:
        DataError: If there are no SA samples or no benign ones.
    """

    def __init__(
        self,
        vlm: VLM,
        samples: Sequence[Sample],
        *,
        is_refusal: Callable[[str], bool],
        max_new_tokens: int = 12,
        batch_size: int = 16,
        false_refusal_weight: float = 1.0,
    ) -> None:
        names = {sample.set_name for sample in samples}
        if "SA" not in names or not names & {"TCB", "GB"}:
            raise DataError(
                f"a validation by rates needs SA samples and benign ones, found {sorted(names)}. "
                "Hold out some of each."
            )
        self.vlm, self.samples, self.is_refusal = vlm, list(samples), is_refusal
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self.weight = false_refusal_weight
        self.history: list[HeldOutRates] = []

    def __call__(self, method: "SecurityTensors") -> float:
        """Apply a tensor, answer the samples and score the answers.

        Args:
            method: The tensor so far.
        """
        with method.apply(self.vlm):
            answers = generate_answers(
                self.vlm,
                [sample.prompt for sample in self.samples],
                [open_images(sample) for sample in self.samples],
                max_new_tokens=self.max_new_tokens,
                batch_size=self.batch_size,
            )
        by_set: dict[str, list[bool]] = {}
        for sample, answer in zip(self.samples, answers, strict=True):
            by_set.setdefault(sample.set_name, []).append(self.is_refusal(answer))
        rates = {name: sum(found) / len(found) for name, found in by_set.items()}
        harmless = rates.pop("SA")
        score = harmless - self.weight * max(rates.values())
        self.history.append(HeldOutRates(harmless, rates, score))
        return score


def split_by_picture(
    samples: Sequence[Sample], share: float, *, seed: int = 0
) -> tuple[list[Sample], list[Sample]]:
    """Hold out a share of the pictures of each set, with all their samples.

    Args:
        samples: Samples with their sets; those without a picture are told apart by prompt.
        share: Share of the pictures, above 0 and below 1.
        seed: Seed of the choice.

    Returns:
        The samples to fit on and the held-out ones, both in the order given. No picture is in
        both.

    Raises:
        DataError: If the share is out of range or a set has too few pictures for it.
    """
    if not 0 < share < 1:
        raise DataError(f"the share of held-out pictures must be above 0 and below 1: {share}.")
    held: set[object] = set()
    claimed: set[object] = set()
    generator = random.Random(seed)
    for name in sorted({sample.set_name for sample in samples}):
        own = dict.fromkeys(_picture(s) for s in samples if s.set_name == name)
        keys = [key for key in own if key not in claimed]
        count = round(share * len(own))
        if not 0 < count < len(own):
            raise DataError(
                f"set {name} has {len(own)} pictures, too few to hold out {share:.0%} of them. "
                "Give more pictures or another share."
            )
        held |= set(generator.sample(keys, min(count, len(keys))))
        claimed |= set(own)
    fitted = [sample for sample in samples if _picture(sample) not in held]
    return fitted, [sample for sample in samples if _picture(sample) in held]


def _picture(sample: Sample) -> object:
    return sample.images or sample.prompt
