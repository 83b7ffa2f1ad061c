import torch

from safebridge.data.sample import Sample
from safebridge.methods.activation_revision.condition import _find_best_layer, _hold_out


def states_of(things: list[int], *, is_bad: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(int(is_bad))
    knows_thing = 10 * torch.nn.functional.one_hot(torch.tensor(things), 24).float()
    knows_harm = torch.randn(len(things), 24, generator=generator)
    knows_harm[:, 0] += 2.0 if is_bad else -2.0
    return torch.stack([knows_thing, knows_harm], dim=1)


def test_a_layer_that_knows_the_things_again_is_not_taken_for_one_that_knows_harm() -> None:
    bad, good = [i for i in range(12) for _ in range(8)], list(range(12, 24)) * 8
    sides = [
        (
            states_of(part, is_bad=is_bad),
            [Sample(str(i), "?", concept=str(thing)) for i, thing in enumerate(part)],
        )
        for part, is_bad in ((bad, True), (good, False))
    ]
    assert [_find_best_layer(*sides, seed) for seed in range(5)] == [1] * 5
    nameless = [
        (states, [Sample(sample.id, "?") for sample in samples]) for states, samples in sides
    ]
    assert _find_best_layer(*nameless, 0) == 0


def test_no_thing_is_on_both_sides_of_the_threshold() -> None:
    samples = [Sample(str(i), "?", concept=f"thing {i % 9}") for i in range(90)]
    mask = _hold_out(samples, 1 / 3, seed=0).tolist()
    sides = [
        {own.concept for own, is_out in zip(samples, mask, strict=True) if is_out == side}
        for side in (True, False)
    ]
    assert len(sides[0]) == 3
    assert not sides[0] & sides[1]
