"""Contrastive groups: three strategies, several sources, nothing harmful written."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from safebridge.data.sample import Sample
from safebridge.data.twins import load_samples
from safebridge.errors import DataError
from safebridge.evaluation.judges import score_refusal
from safebridge.methods.activation_revision.samples import (
    OPENERS,
    REMINDERS,
    SAFE,
    UNSAFE,
    add_own_answers,
    build_multi_instruction,
    build_multi_response,
    build_reminded,
    build_single_response,
    check_groups,
    group_of,
    load_vlguard,
    pair_by_picture,
    pair_by_request,
    split_triad,
    take_groups,
)


def test_single_response_has_one_fixed_pair_for_all(requests: list[Sample]) -> None:
    samples = build_single_response(requests)
    assert len(samples) == 2 * len(requests)
    answers = {side: {s.answer for s in samples if s.set_name == side} for side in (SAFE, UNSAFE)}
    assert all(len(texts) == 1 for texts in answers.values())
    assert score_refusal(answers[SAFE].pop() or "").is_refusal
    assert {group_of(s) for s in samples} == {s.id for s in requests}


def test_multi_response_draws_several_for_each_prompt(requests: list[Sample]) -> None:
    own = [replace(s, answer="I must decline this.") for s in requests]
    samples = build_multi_response(own, count=3, seed=1)
    for request in own:
        group = [s for s in samples if group_of(s) == request.id]
        safe = [s.answer for s in group if s.set_name == SAFE]
        assert safe[0] == "I must decline this."
        assert len(set(safe)) == 3
        assert len({s.answer for s in group if s.set_name == UNSAFE}) == 3
        assert {s.prompt for s in group} == {request.prompt}
    assert samples == build_multi_response(own, count=3, seed=1)
    assert samples != build_multi_response(own, count=3, seed=2)


def test_multi_instruction_pairs_requests_without_answers() -> None:
    harmful = load_samples("harmful_image", "fit", limit=20)
    harmless = load_samples("benign_image", "fit")
    pairs = pair_by_request(harmless, harmful)
    assert len(pairs) == 20
    samples = build_multi_instruction(pairs)
    for safe, unsafe in zip(samples[::2], samples[1::2], strict=True):
        assert safe.prompt == unsafe.prompt
        assert safe.images != unsafe.images
        assert (safe.set_name, unsafe.set_name) == (SAFE, UNSAFE)
        assert safe.answer is None
        assert group_of(safe) == group_of(unsafe)


def test_reminded_requests_differ_in_the_reminder_alone(requests: list[Sample]) -> None:
    samples = build_reminded(requests)
    for safe, unsafe in zip(samples[::2], samples[1::2], strict=True):
        assert safe.images == unsafe.images
        assert safe.prompt.startswith(unsafe.prompt)
        assert safe.prompt.removeprefix(unsafe.prompt).strip() in REMINDERS


def test_own_answers_count_only_where_they_are_unsafe(requests: list[Sample]) -> None:
    samples = build_single_response(requests)
    answers = ["I cannot help with that."] + ["You take it and go."] * (len(requests) - 2) + [" "]
    more = add_own_answers(
        samples, requests, answers, is_unsafe=lambda text: not score_refusal(text).is_refusal
    )
    own = more[len(samples) :]
    assert [group_of(s) for s in own] == [s.id for s in requests[1:-1]]
    assert {s.set_name for s in own} == {UNSAFE}


def test_our_own_sentences_hold_no_instructions_and_end_alike() -> None:
    for opener in OPENERS:
        assert opener.endswith(".")
        assert not score_refusal(opener).is_refusal
    assert len(set(OPENERS)) == len(OPENERS)
    assert len(set(REMINDERS)) == len(REMINDERS)


def test_a_triad_gives_harmful_requests_with_refusals_and_benign_ones(triad: list[Sample]) -> None:
    harmful, benign = split_triad(triad)
    assert {s.set_name for s in harmful} == {"SA"}
    assert {s.set_name for s in benign} == {"TCB", "GB"}
    marked = [replace(s, is_harmful=True) for s in harmful]
    safe = [s for s in build_multi_response(marked) if s.set_name == SAFE]
    assert {s.answer for s in safe} >= {s.answer for s in harmful}


def test_vlguard_files_become_samples_and_pairs(tmp_path: Path) -> None:
    items = [
        {
            "id": "1",
            "image": "a/1.jpg",
            "safe": True,
            "instr-resp": [
                {"safe_instruction": "What is it?", "response": "A cat."},
                {"unsafe_instruction": "Mock it.", "response": "I cannot."},
            ],
        },
        {
            "id": "2",
            "image": "b/2.jpg",
            "safe": False,
            "harmful_category": "privacy",
            "instr-resp": [{"instruction": "Read this.", "response": "I will not."}],
        },
    ]
    (tmp_path / "train.json").write_text(json.dumps(items))
    samples = load_vlguard(tmp_path / "train.json", tmp_path)
    assert [s.is_harmful for s in samples] == [False, True, True]
    assert samples[2].images == (tmp_path / "b/2.jpg",)
    assert samples[2].category == "privacy"
    assert pair_by_picture(samples) == [(samples[0], samples[1])]
    (tmp_path / "train.json").write_text(json.dumps([{"id": "1"}]))
    with pytest.raises(DataError, match="It needs id, image"):
        load_vlguard(tmp_path / "train.json", tmp_path)
    with pytest.raises(DataError, match=r"Give VLGuard's train\.json"):
        load_vlguard(tmp_path / "none.json", tmp_path)


def test_fewer_groups_are_part_of_more_groups(requests: list[Sample]) -> None:
    samples = build_multi_response(requests, count=2)
    few, more = (take_groups(samples, count, seed=3) for count in (2, 4))
    assert {group_of(s) for s in few} < {group_of(s) for s in more}
    assert len(few) == 2 * 4
    with pytest.raises(DataError, match="Give more samples"):
        take_groups(samples, 7)


def test_wrong_groups_are_refused(requests: list[Sample], benign: list[Sample]) -> None:
    samples = build_single_response(requests)
    with pytest.raises(DataError, match="Build some"):
        check_groups([])
    with pytest.raises(DataError, match="expected 'safe' or 'unsafe'"):
        check_groups([replace(samples[0], set_name="SA")])
    with pytest.raises(DataError, match="needs both"):
        check_groups(samples[:1])
    with pytest.raises(DataError, match="Give each its own"):
        check_groups([*samples, samples[0]])
    with pytest.raises(DataError, match="a harmful request is needed"):
        build_single_response(benign)
    with pytest.raises(DataError, match="Give one for each"):
        add_own_answers(samples, requests, [], is_unsafe=bool)
