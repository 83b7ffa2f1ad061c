"""The undefended model's own answers, the targets of the benign sets."""

import re
from collections.abc import Callable, Sequence

from safebridge.data.sample import Sample, open_images
from safebridge.models.generate import generate_answers
from safebridge.models.load import VLM

__all__ = ["answer_samples", "cut_to_sentences"]

_SENTENCE_END = re.compile(r"[^\W\d][.!?][\"')\]]*(?=\s|$)")


def answer_samples(
    vlm: VLM,
    samples: Sequence[Sample],
    *,
    max_new_tokens: int = 24,
    batch_size: int = 16,
    progress: Callable[[int], object] | None = None,
) -> list[str]:
    """Let the model answer samples greedily, ready as targets of a fit.

    An answer that reached the limit is cut to its whole sentences, so that the target
    does not teach the model to stop in mid-sentence.

    Args:
        vlm: The undefended model.
        samples: What to ask; their own answers are not read.
        max_new_tokens: Longest answer in tokens.
        batch_size: Samples that are answered together.
        progress: Called after each batch with the number of answers it brought.

    Returns:
        One answer for each sample, in their order.

    Raises:
        DataError: If a picture cannot be opened.
    """
    answers = generate_answers(
        vlm,
        [sample.prompt for sample in samples],
        [open_images(sample) for sample in samples],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=progress,
    )

    def is_cut(answer: str) -> bool:
        # One token less, because the decoded text may lack white space that was generated.
        ids = vlm.tokenizer(answer, add_special_tokens=False)["input_ids"]
        return len(ids) >= max_new_tokens - 1

    return [cut_to_sentences(answer) if is_cut(answer) else answer for answer in answers]


def cut_to_sentences(text: str) -> str:
    """Drop an unfinished last sentence; a text without a finished one stays as it is.

    Args:
        text: Any text.
    """
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return text[: ends[-1]] if ends else text
