"""The scaling test: exact scaling, exact return, and the paper's own table."""

from collections.abc import Callable

import pytest
import torch

from safebridge.analysis.scaling import choose_alpha, refine_range, scaled_layers
from safebridge.errors import SettingError, ShapeError
from safebridge.models.load import VLM

# Li et al. 2025 (arXiv:2408.17003): refusals by upper and by lower bound, and the final range.
LLAMA_3 = {
    **{(7, end): n for end, n in {10: 272, 11: 241, 12: 283, 13: 266, 14: 256}.items()},
    **{(start, 12): n for start, n in {8: 334, 7: 283, 6: 371, 5: 358, 4: 223}.items()},
}
PHI_3 = {
    **{(11, end): n for end, n in {13: 209, 14: 190, 15: 149, 16: 181, 17: 189}.items()},
    **{(start, 15): n for start, n in {13: 237, 12: 182, 11: 149, 10: 177, 9: 163}.items()},
}


@pytest.mark.parametrize("family", ["llava", "mllama", "qwen2_vl"])
def test_matrices_are_scaled_inside_and_the_same_tensors_afterwards(
    tiny: Callable[[str], VLM], family: str
) -> None:
    vlm = tiny(family)
    before = {name: (p.data, p.data.clone()) for name, p in vlm.model.named_parameters()}
    layers = [f"{vlm.layout.decoder_layers}.{layer}." for layer in (1, 2)]
    with scaled_layers(vlm, 1, 2, 1.5):
        changed = {
            name for name, p in vlm.model.named_parameters() if not torch.equal(p, before[name][1])
        }
        assert changed
        for name in changed:
            assert any(name.startswith(layer) for layer in layers)
            assert torch.equal(vlm.model.get_parameter(name), before[name][1] * 1.5)
            assert vlm.model.get_parameter(name).ndim == 2
    with pytest.raises(RuntimeError, match="stop"), scaled_layers(vlm, 1, 2, 1.5):
        raise RuntimeError("stop")
    for name, parameter in vlm.model.named_parameters():
        assert parameter.data.data_ptr() == before[name][0].data_ptr()
        assert torch.equal(parameter, before[name][1])


def test_llava_scales_all_seven_matrices_of_a_layer(tiny: Callable[[str], VLM]) -> None:
    vlm = tiny("llava")
    before = {name: p.clone() for name, p in vlm.model.named_parameters()}
    with scaled_layers(vlm, 0, 0, 2.0):
        changed = {
            name.rsplit(".", 2)[1]
            for name, p in vlm.model.named_parameters()
            if not torch.equal(p, before[name])
        }
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_a_layer_that_is_not_there_is_refused(tiny: Callable[[str], VLM]) -> None:
    with (
        pytest.raises(ShapeError, match="no decoder layer"),
        scaled_layers(tiny("llava"), 3, 9, 2.0),
    ):
        pass


@pytest.mark.parametrize(
    ("counts", "start", "alpha", "wanted"),
    [(LLAMA_3, (7, 12), 1.2, (6, 12)), (PHI_3, (11, 15), 0.8, (11, 15))],
)
def test_the_papers_counts_give_the_papers_ranges(
    counts: dict[tuple[int, int], int],
    start: tuple[int, int],
    alpha: float,
    wanted: tuple[int, int],
) -> None:
    # The table sweeps the lower bound over 8..4, one step down from the given bound.
    def count(first: int, last: int, _alpha: float) -> int:
        return counts.get((first, last), 250 if alpha > 1 else 200)

    found = refine_range(count, *start, num_layers=32, alpha=alpha)
    assert (found.first, found.last) == wanted
    assert dict(found.upper)[start[1]] == counts[start]


def test_bounds_stay_inside_the_model() -> None:
    found = refine_range(lambda *_: 5, 0, 3, num_layers=4, alpha=1.1, reach=3)
    assert [end for end, _ in found.upper] == [0, 1, 2, 3]
    assert [start for start, _ in found.lower] == [0, 1, 2, 3]
    assert (found.first, found.last) == (0, 3)  # equal counts leave the bounds as they were


def test_alpha_grows_until_the_bounds_matter() -> None:
    def count(_first: int, last: int, alpha: float) -> int:
        return round(100 * (alpha - 1) * last)

    tried = choose_alpha(count, 2, 4, num_layers=10, least_spread=20.0)
    assert [step.alpha for step in tried] == pytest.approx([1.05, 1.1, 1.15])
    assert tried[-1].spread >= 20 > tried[-2].spread
    lowered = choose_alpha(count, 2, 4, num_layers=10, least_spread=20.0, is_raised=False)
    assert lowered[-1].alpha == pytest.approx(0.85)


def test_without_enough_spread_the_widest_is_chosen() -> None:
    spreads = {1.05: 1, 1.1: 3, 1.15: 2}
    tried = choose_alpha(
        lambda _first, last, alpha: spreads[alpha] * last,
        2, 4, num_layers=10, least_spread=99.0, most_steps=3,
    )  # fmt: skip
    assert tried[-1].alpha == 1.1
    assert len(tried) == 3


def test_factors_that_test_nothing_are_refused() -> None:
    with pytest.raises(SettingError, match="above or below 1"):
        refine_range(lambda *_: 1, 1, 2, num_layers=4, alpha=1.0)
    with pytest.raises(SettingError, match="leave no factor above 0"):
        choose_alpha(lambda *_: 1, 1, 2, num_layers=4, least_spread=1.0, is_raised=False, step=0.2)
