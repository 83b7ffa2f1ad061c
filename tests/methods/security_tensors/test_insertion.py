import pytest
import torch

from safebridge.errors import SettingError
from safebridge.methods.security_tensors.insertion import (
    extend_inputs,
    find_insertion_points,
    insert_columns,
    mark_columns,
    place_tokens,
    remove_columns,
    shift_positions,
)

IMAGE = 9
IDS = torch.tensor([[0, 1, 9, 9, 2, 3], [1, 9, 9, 2, 0, 0], [1, 2, 3, 4, 5, 6]])
MASK = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])


def test_a_prefix_goes_before_the_first_real_token() -> None:
    assert find_insertion_points(IDS, MASK, "prefix", IMAGE).tolist() == [1, 0, 0]


def test_after_image_goes_behind_the_last_image_token_or_to_the_front() -> None:
    assert find_insertion_points(IDS, MASK, "after_image", IMAGE).tolist() == [4, 3, 0]
    assert find_insertion_points(IDS, MASK, "after_image", None).tolist() == [1, 0, 0]


@pytest.mark.parametrize("at", [[0, 0], [2, 1], [3, 3]])
def test_inserting_equals_a_plain_loop_and_removing_undoes_it(at: list[int]) -> None:
    values, n = torch.arange(12).view(2, 3, 2), 2
    expected = torch.stack(
        [
            torch.cat([row[:a], torch.full((n, 2), -7), row[a:]])
            for row, a in zip(values, at, strict=True)
        ]
    )
    found = insert_columns(values, torch.tensor(at), n, -7)
    assert torch.equal(found, expected)
    assert torch.equal(remove_columns(found, torch.tensor(at), n), values)


def test_each_row_can_have_its_own_fill() -> None:
    found = insert_columns(torch.zeros(2, 1).long(), torch.tensor([0, 1]), 1, torch.tensor([5, 6]))
    assert found.tolist() == [[5, 0], [0, 6]]


def test_marked_columns_are_the_n_from_at_on() -> None:
    assert mark_columns(torch.tensor([0, 2]), 2, 4).tolist() == [
        [True, True, False, False],
        [False, False, True, True],
    ]


def test_tokens_are_placed_over_their_columns_in_any_stretch() -> None:
    tokens, at = torch.tensor([[1.0], [2.0]]), torch.tensor([1, 3])
    found = place_tokens(torch.zeros(2, 6, 1), tokens, at)
    assert found[..., 0].tolist() == [[0, 1, 2, 0, 0, 0], [0, 0, 0, 1, 2, 0]]
    parts = [place_tokens(torch.zeros(2, 2, 1), tokens, at, start) for start in (0, 2, 4)]
    assert torch.equal(torch.cat(parts, dim=1), found)


def test_placing_tokens_passes_their_gradient_on() -> None:
    tokens = torch.ones(2, 1, requires_grad=True)
    place_tokens(torch.zeros(3, 4, 1), tokens, torch.tensor([0, 1, 2])).sum().backward()
    assert tokens.grad is not None
    assert tokens.grad[:, 0].tolist() == [3.0, 3.0]


def test_positions_open_and_move_on_every_axis() -> None:
    positions = torch.tensor([[0, 1, 2, 3], [0, 0, 1, 2]])
    expected = [[0, 1, 2, 3, 4, 5], [0, 0, 1, 2, 3, 4]]
    at = torch.tensor([1, 1])
    assert shift_positions(positions, at, 2).tolist() == expected
    found = shift_positions(torch.stack([positions, positions]), at, 2)
    assert found.tolist() == [expected, expected]


def test_positions_go_on_after_the_last_token() -> None:
    found = shift_positions(torch.tensor([[4, 5]]), torch.tensor([2]), 2)
    assert found.tolist() == [[4, 5, 6, 7]]


def test_every_input_with_a_column_per_token_is_extended() -> None:
    inputs = {
        "input_ids": IDS[:2],
        "attention_mask": MASK[:2],
        "labels": IDS[:2],
        "mm_token_type_ids": torch.ones(2, 6).long(),
        "cross_attention_mask": torch.ones(2, 6, 1, 4),
        "pixel_values": torch.ones(2, 3, 4, 4),
        "use_cache": True,
    }
    before = {name: getattr(value, "clone", lambda v=value: v)() for name, value in inputs.items()}
    found = extend_inputs(inputs, torch.tensor([1, 3]), 2, IMAGE)
    assert found["input_ids"].tolist() == [[0, 3, 3, 1, 9, 9, 2, 3], [1, 9, 9, 2, 2, 2, 0, 0]]
    assert found["attention_mask"].tolist() == [[0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0]]
    assert found["labels"][0, 1:3].tolist() == [-100, -100]
    assert found["mm_token_type_ids"][1].tolist() == [1, 1, 1, 0, 0, 1, 1, 1]
    assert not found["cross_attention_mask"][0, 1:3].any()
    assert found["pixel_values"] is inputs["pixel_values"]
    assert found["use_cache"] is True
    for name, value in before.items():
        assert value is inputs[name] or torch.equal(value, inputs[name])


def test_a_mask_of_ones_stands_in_for_none() -> None:
    found = extend_inputs({"input_ids": IDS[2:]}, torch.tensor([0]), 2, IMAGE)
    assert found["attention_mask"].tolist() == [[1] * 8]


def test_other_masks_are_refused() -> None:
    inputs = {"input_ids": IDS, "attention_mask": torch.ones(3, 1, 6, 6)}
    with pytest.raises(SettingError, match=r"attention_mask of shape \[batch, seq\]"):
        extend_inputs(inputs, torch.tensor([0, 0, 0]), 2, IMAGE)
