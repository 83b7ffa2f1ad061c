from collections.abc import Callable

import pytest
import torch

from safebridge.artifacts.store import ArtifactMetadata
from safebridge.data.sample import Sample
from safebridge.errors import DataError
from safebridge.methods.security_tensors.answers import answer_samples
from safebridge.methods.security_tensors.config import SecurityTensorsConfig
from safebridge.methods.security_tensors.method import SecurityTensors
from safebridge.methods.security_tensors.validation import RateValidation, split_by_picture
from safebridge.models.load import VLM

METADATA = ArtifactMetadata("m", None, "f", "d", 0)


def tensor(scale: float) -> SecurityTensors:
    tokens = scale * torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    config = SecurityTensorsConfig(num_virtual_tokens=4)
    return SecurityTensors(config, {"tokens": tokens}, METADATA)


def test_the_score_is_refusals_on_harm_less_the_worse_false_refusals(
    tiny: Callable[[str], VLM], triad: list[Sample]
) -> None:
    vlm, method = tiny("llava"), tensor(1.0)
    with method.apply(vlm):
        answers = answer_samples(vlm, triad, max_new_tokens=4)
    refused = {answers[0], answers[1]}  # by hand: whichever answers count as refusals
    validation = RateValidation(
        vlm, triad, is_refusal=lambda text: text in refused, max_new_tokens=4
    )
    rates: dict[str, list[bool]] = {"SA": [], "TCB": [], "GB": []}
    for sample, answer in zip(triad, answers, strict=True):
        rates[sample.set_name].append(answer in refused)
    share = {name: sum(found) / len(found) for name, found in rates.items()}
    assert validation(method) == pytest.approx(share["SA"] - max(share["TCB"], share["GB"]))
    assert validation.history[0].harmless_rate == share["SA"]
    assert validation.history[0].false_refusal_rates == {k: share[k] for k in ("TCB", "GB")}


def test_refusing_everything_and_nothing_are_worth_the_same(
    tiny: Callable[[str], VLM], triad: list[Sample]
) -> None:
    for verdict in (True, False):
        validation = RateValidation(
            tiny("llava"), triad, is_refusal=lambda _, v=verdict: v, max_new_tokens=2
        )
        assert validation(tensor(0.1)) == 0.0


def test_a_fit_stops_by_rates_and_keeps_the_best_tensor(
    tiny: Callable[[str], VLM], triad: list[Sample]
) -> None:
    vlm, asked, seen = tiny("llava"), [], []

    def is_refusal(text: str) -> bool:
        asked.append(text)
        epoch, sample = divmod(len(asked) - 1, len(triad))
        return epoch == 1 and triad[sample].set_name == "SA"

    rates = RateValidation(vlm, triad, is_refusal=is_refusal, max_new_tokens=2)

    def validate(method: SecurityTensors) -> float:
        seen.append(method.tensors["tokens"])
        return rates(method)

    config = SecurityTensorsConfig(num_virtual_tokens=2, epochs=9, batch_size=3, patience=2)
    method = SecurityTensors.fit(vlm, triad, config, validation=validate)
    assert method.metadata.details["is_stopped_early"]
    assert [found.score for found in rates.history] == [0.0, 1.0, 0.0, 0.0]
    assert torch.equal(method.tensors["tokens"], seen[1])


def test_sets_that_say_nothing_are_refused(tiny: Callable[[str], VLM], triad: list[Sample]) -> None:
    only = [sample for sample in triad if sample.set_name == "SA"]
    with pytest.raises(DataError, match=r"found \['SA'\]. Hold out some of each"):
        RateValidation(tiny("llava"), only, is_refusal=bool)


def test_no_picture_is_fitted_and_held_out(triad: list[Sample]) -> None:
    folder = triad[0].images[0].parent
    many = [
        Sample(id=f"{name}{n}", prompt="a", images=(folder / f"{name}{n // 2}",), set_name=name)
        for name in ("SA", "TCB", "GB")
        for n in range(20)
    ]
    fitted, held = split_by_picture(many, 0.3, seed=1)
    assert not {s.images for s in fitted} & {s.images for s in held}
    assert sorted(s.id for s in fitted + held) == sorted(s.id for s in many)
    for name in ("SA", "TCB", "GB"):
        assert len({s.images for s in held if s.set_name == name}) == 3
    assert split_by_picture(many, 0.3, seed=1) == (fitted, held)
    assert split_by_picture(many, 0.3, seed=2) != (fitted, held)


def test_pictures_that_two_sets_share_are_held_out_of_both(triad: list[Sample]) -> None:
    paths = [triad[0].images[0].with_name(str(n)) for n in range(10)]
    both = [
        Sample(id=f"{name}{n}", prompt="a", images=(path,), set_name=name)
        for name in ("TCB", "GB")
        for n, path in enumerate(paths)
    ]
    fitted, held = split_by_picture(both, 0.2)
    assert not {s.images for s in fitted} & {s.images for s in held}
    assert {s.set_name for s in held} == {"TCB", "GB"}


@pytest.mark.parametrize("share", [0.0, 1.0, 0.01])
def test_shares_that_leave_nothing_are_refused(triad: list[Sample], share: float) -> None:
    with pytest.raises(DataError, match=r"held-out pictures|too few to hold out"):
        split_by_picture(triad, share)
