from collections.abc import Callable

import pytest

from safebridge.data.sample import Sample
from safebridge.methods.security_tensors.answers import answer_samples, cut_to_sentences
from safebridge.models.load import VLM


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Cut it. Then fry", "Cut it."),
        ('He said "stop!" and th', 'He said "stop!"'),
        ("1. Take a cup and", "1. Take a cup and"),
        ("no end here", "no end here"),
        ("Done.", "Done."),
        ("Pi is 3.14 or", "Pi is 3.14 or"),
    ],
)
def test_an_unfinished_sentence_is_dropped(text: str, expected: str) -> None:
    assert cut_to_sentences(text) == expected


def test_every_sample_gets_an_answer_in_its_order(
    tiny: Callable[[str], VLM], triad: list[Sample]
) -> None:
    vlm, counts = tiny("llava"), []
    together = answer_samples(vlm, triad, max_new_tokens=4, batch_size=4, progress=counts.append)
    alone = [answer_samples(vlm, [sample], max_new_tokens=4)[0] for sample in triad]
    assert together == alone
    assert sum(counts) == len(triad)
