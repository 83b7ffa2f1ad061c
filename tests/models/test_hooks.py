"""Hooks: what they see and replace, and that they leave no trace."""

import pytest
import torch
from torch import Tensor, nn

from safebridge.errors import ShapeError
from safebridge.models.hooks import (
    capture_input,
    capture_output,
    replace_input,
    replace_output,
)

CONTEXTS = [
    lambda module: replace_output(module, torch.zeros_like),
    lambda module: replace_input(module, torch.zeros_like),
    capture_output,
    capture_input,
]


class Pair(nn.Module):
    """Returns a tuple, as attention modules do."""

    def forward(self, hidden: Tensor) -> tuple[Tensor, str]:
        return hidden + 1, "weights"


def is_bare(module: nn.Module) -> bool:
    return not module._forward_hooks and not module._forward_pre_hooks


def test_replace_output_passes_the_output_through_the_function() -> None:
    module = nn.Linear(2, 3)
    x = torch.ones(1, 2)
    expected = module(x) * 2
    with replace_output(module, lambda out: out * 2):
        assert torch.equal(module(x), expected)
    assert torch.equal(module(x) * 2, expected)


def test_replace_output_keeps_the_rest_of_a_tuple() -> None:
    module = Pair()
    with replace_output(module, torch.zeros_like):
        hidden, rest = module(torch.ones(2))
    assert torch.equal(hidden, torch.zeros(2))
    assert rest == "weights"


def test_replace_input_changes_what_the_module_gets_and_not_the_callers_tensor() -> None:
    module = nn.Linear(2, 3)
    x = torch.ones(1, 2)
    with replace_input(module, torch.zeros_like):
        assert torch.equal(module(x)[0], module.bias)
    assert torch.equal(x, torch.ones(1, 2))


def test_capture_collects_one_tensor_for_each_call() -> None:
    module = Pair()
    first, second = torch.zeros(2), torch.ones(2)
    with capture_output(module) as outputs, capture_input(module) as inputs:
        module(first)
        module(second)
    module(first)
    assert [tensor.tolist() for tensor in inputs] == [[0, 0], [1, 1]]
    assert [tensor.tolist() for tensor in outputs] == [[1, 1], [2, 2]]


def test_nested_replacements_apply_in_the_order_they_were_opened() -> None:
    module = nn.Identity()
    with replace_output(module, lambda x: x + 1), replace_output(module, lambda x: x * 10):
        assert module(torch.tensor([1.0])).item() == 20


@pytest.mark.parametrize("context", CONTEXTS)
def test_hooks_are_gone_afterwards_also_on_an_error(context: object) -> None:
    module = nn.Linear(2, 2)
    with context(module):
        assert not is_bare(module)
    assert is_bare(module)
    with pytest.raises(RuntimeError, match=r"inside"), context(module):
        raise RuntimeError("inside")
    assert is_bare(module)


def test_replacement_of_another_shape_is_refused() -> None:
    module = nn.Linear(2, 3)
    message = r"shape \(1, 2\), but \(1, 3\) flows there. Return a tensor of the shape"
    with replace_output(module, lambda out: out[:, :2]), pytest.raises(ShapeError, match=message):
        module(torch.ones(1, 2))


def test_module_without_a_tensor_output_is_refused() -> None:
    class Words(nn.Module):
        def forward(self, x: Tensor) -> str:
            return str(x)

    module = Words()
    with capture_output(module), pytest.raises(ShapeError, match=r"Hook a module that takes"):
        module(torch.ones(1))
