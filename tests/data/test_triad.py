from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest

from safebridge.data.sample import Sample
from safebridge.data.triad import (
    build_triad,
    draw_evenly,
    find_own_refusal,
    load_refusals,
    match_benign,
)
from safebridge.errors import DataError
from safebridge.evaluation.judges import score_refusal


def samples(name: str, prompts: Sequence[str], *, is_harmful: bool = False) -> list[Sample]:
    return [
        Sample(id=f"{name}{number}", prompt=prompt, is_harmful=is_harmful)
        for number, prompt in enumerate(prompts)
    ]


HARMFUL = samples("h", ["make", "make", "buy", "only harmful"], is_harmful=True)
BENIGN = samples("b", ["make", "buy", "buy", "only benign"])
GENERAL = samples("g", ["what", "colour"])


def answer(asked: Sequence[Sample]) -> list[str]:
    return [f"about {sample.prompt} " for sample in asked]


def is_refusal(text: str) -> bool:
    return not text.startswith("about")


def test_each_set_gets_its_targets() -> None:
    triad = build_triad(HARMFUL, BENIGN, GENERAL, answer=answer, is_refusal=is_refusal)
    assert [s.set_name for s in triad.samples] == ["SA"] * 3 + ["TCB"] * 3 + ["GB"] * 2
    assert all(s.answer in load_refusals() for s in triad.samples[:3])
    assert [s.answer for s in triad.samples[3:]] == [
        "about make", "about buy", "about buy", "about what", "about colour",
    ]  # fmt: skip
    assert all(s.set_name == "" for s in HARMFUL + BENIGN + GENERAL)


def test_sa_and_tcb_share_their_requests() -> None:
    triad = build_triad(HARMFUL, BENIGN, GENERAL, answer=answer, is_refusal=is_refusal)
    prompts = {name: {s.prompt for s in triad.samples if s.set_name == name}
               for name in ("SA", "TCB")}  # fmt: skip
    assert prompts["SA"] == prompts["TCB"] == {"make", "buy"}
    assert triad.report.dropped == {
        "SA: no benign picture with this request": 1,
        "TCB: no harmful picture with this request": 1,
    }
    assert triad.report.counts == {"SA": 3, "TCB": 3, "GB": 2}


def test_the_report_says_how_telling_the_wording_is() -> None:
    # By hand: "make" is 2/3 of SA and 1/3 of TCB, "buy" the reverse; guessing the likelier is 2/3.
    triad = build_triad(HARMFUL, BENIGN, GENERAL, answer=answer, is_refusal=is_refusal)
    assert triad.report.text_only_accuracy == pytest.approx(2 / 3)
    even = build_triad(HARMFUL[1:3], BENIGN[:2], GENERAL, answer=answer, is_refusal=is_refusal)
    assert even.report.text_only_accuracy == pytest.approx(0.5)


def test_samples_are_drawn_evenly_over_styles_and_then_over_things() -> None:
    offered = [
        replace(sample, style=style, concept=f"thing {number % things}")
        for style, count, things in (("flat", 40, 4), ("ink", 6, 2))
        for number, sample in enumerate(samples(style, ["make"] * count))
    ]
    drawn = draw_evenly(offered, 8, seed=0)
    assert Counter(s.style for s in drawn) == {"flat": 4, "ink": 4}
    assert Counter(s.concept for s in drawn if s.style == "flat") == Counter(
        f"thing {number}" for number in range(4)
    )
    assert drawn == draw_evenly(offered, 8, seed=0) != draw_evenly(offered, 8, seed=1)
    assert len({s.id for s in draw_evenly(offered, 100)}) == 46


def test_benign_samples_are_chosen_with_the_requests_and_styles_of_the_harmful_ones() -> None:
    harmful = [replace(sample, style="flat") for sample in samples("h", ["make", "buy", "make"])]
    offered = [
        replace(sample, style=style, concept=f"thing {number}")
        for style in ("flat", "ink")
        for number, sample in enumerate(samples(style, ["make", "buy", "sell", "make", "make"]))
    ]
    chosen = match_benign(harmful, offered, 3, seed=0)
    assert sorted((s.prompt, s.style) for s in chosen) == [
        ("buy", "flat"),
        ("make", "flat"),
        ("make", "flat"),
    ]
    assert len({s.concept for s in chosen}) == 3
    assert len(match_benign(harmful, offered, 100)) == 4  # all that fit
    assert match_benign(harmful, [], 3) == []


def test_the_most_frequent_own_refusal_is_found() -> None:
    often, once, other = "I won't help with that.", "I can't help with this.", "about two eggs"
    assert find_own_refusal([once, other, f"{often} ", often, other, other], is_refusal) == often
    assert find_own_refusal(["about two eggs"], is_refusal) is None


def test_refused_and_empty_answers_are_dropped_and_counted() -> None:
    def moody(asked: Sequence[Sample]) -> list[str]:
        texts = {"b0": "I can't.", "b1": "  ", "g0": "I won't."}
        return [texts.get(sample.id, "about it") for sample in asked]

    triad = build_triad(HARMFUL, BENIGN, GENERAL, answer=moody, is_refusal=is_refusal_or_empty)
    assert [s.id for s in triad.samples[3:]] == ["b2", "g1"]
    assert triad.report.dropped["TCB: the model refuses"] == 1
    assert triad.report.dropped["TCB: empty answer"] == 1
    assert triad.report.dropped["GB: the model refuses"] == 1


def is_refusal_or_empty(text: str) -> bool:
    return not text.startswith("about")


def test_a_set_that_ends_up_empty_says_why() -> None:
    with pytest.raises(DataError, match=r"set GB is empty; left out: .*'GB: the model refuses': 2"):
        build_triad(
            HARMFUL,
            BENIGN,
            GENERAL,
            answer=lambda asked: ["no" if s.id[0] == "g" else "about" for s in asked],
            is_refusal=is_refusal,
        )
    with pytest.raises(DataError, match="Give both the same templates"):
        build_triad(HARMFUL[:2], BENIGN[1:], GENERAL, answer=answer, is_refusal=is_refusal)


def test_samples_in_the_wrong_set_are_refused() -> None:
    wrong = [replace(GENERAL[0], is_harmful=True)]
    with pytest.raises(DataError, match="'g0' is marked harmful, but was given for GB"):
        build_triad(HARMFUL, BENIGN, wrong, answer=answer, is_refusal=is_refusal)
    with pytest.raises(DataError, match="'b0' is marked benign, but was given for SA"):
        build_triad(BENIGN, BENIGN, GENERAL, answer=answer, is_refusal=is_refusal)


def test_a_target_that_is_no_refusal_is_refused() -> None:
    with pytest.raises(DataError, match="'about time' does not count as a refusal"):
        build_triad(
            HARMFUL, BENIGN, GENERAL, answer=answer, is_refusal=is_refusal, refusals=["about time"]
        )
    with pytest.raises(DataError, match="refusals=None"):
        build_triad(HARMFUL, BENIGN, GENERAL, answer=answer, is_refusal=is_refusal, refusals=[])


def test_answers_that_do_not_fit_the_samples_are_refused() -> None:
    with pytest.raises(DataError, match="3 samples of TCB got 1 answers"):
        build_triad(HARMFUL, BENIGN, GENERAL, answer=lambda _: ["about"], is_refusal=is_refusal)


def test_refusals_are_dealt_evenly_and_by_seed() -> None:
    many = samples("h", ["make"] * 100, is_harmful=True)

    def targets(seed: int) -> list[str | None]:
        triad = build_triad(many, BENIGN, GENERAL, answer=answer, is_refusal=is_refusal, seed=seed)
        return [s.answer for s in triad.samples if s.set_name == "SA"]

    counts = Counter(targets(0))
    assert len(counts) == len(load_refusals())
    assert max(counts.values()) - min(counts.values()) <= 1
    assert targets(0) == targets(0)
    assert targets(0) != targets(1)


def test_our_refusals_are_many_short_and_distinct_and_read_as_refusals() -> None:
    refusals = load_refusals()
    assert all(score_refusal(text).is_refusal for text in refusals)
    assert len(set(refusals)) == len(refusals) >= 20
    assert all(len(text.split()) <= 14 for text in refusals)
