from dataclasses import fields

import pytest

from safebridge.cli.fields import describe_fields
from safebridge.demo.config import FAST, DemoConfig, choose_config
from safebridge.errors import DataError


def test_every_size_is_described() -> None:
    assert set(describe_fields(DemoConfig)) == {field.name for field in fields(DemoConfig)}


def test_fast_is_nowhere_larger_than_the_default() -> None:
    default = vars(DemoConfig())
    sizes = {name: value for name, value in vars(FAST).items() if name != "position"}
    assert all(value <= default[name] for name, value in sizes.items())


def test_a_given_size_wins_over_fast() -> None:
    config = choose_config(is_fast=True, given={"naming_samples": 7})
    assert config.naming_samples == 7
    assert config.benign_samples == FAST.benign_samples


@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("seed", -1), ("epochs", -3)])
def test_a_size_that_leaves_nothing_to_do_names_its_option(name: str, value: int) -> None:
    with pytest.raises(DataError, match="--" + name.replace("_", "-") + " must be"):
        DemoConfig(**{name: value})


def test_an_unknown_position_is_refused_before_anything_runs() -> None:
    with pytest.raises(DataError, match="--position must be one of prefix, after_image"):
        DemoConfig(position="suffix")
