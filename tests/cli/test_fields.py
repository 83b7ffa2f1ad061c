import argparse
from dataclasses import dataclass, field

import pytest

from safebridge.cli.fields import add_config_arguments, describe_fields, read_config_arguments


@dataclass(frozen=True)
class Sizes:
    """A config as the library has them."""

    steps: int = 5
    """How often the tensor
    is changed; 100 % of the work."""

    rate: float = 0.5
    """Size of a step."""

    is_verbose: bool = False
    """Whether to talk."""

    layers: tuple[int, ...] = field(default_factory=tuple)
    """Not an option: a tuple does not fit on a command line."""

    silent: str = "no"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    add_config_arguments(parser, Sizes, "sizes")
    return parser


def test_the_text_under_a_field_is_found_and_put_on_one_line() -> None:
    texts = describe_fields(Sizes)
    assert texts["steps"] == "How often the tensor is changed; 100 % of the work."
    assert "silent" not in texts


def test_the_text_becomes_the_help_with_the_default() -> None:
    text = " ".join(build_parser().format_help().split())
    assert "--rate FLOAT Size of a step. Default: 0.5." in text
    assert "100 % of the work" in text
    assert "--layers" not in text


@pytest.mark.parametrize(
    ("words", "given"),
    [
        ([], {}),
        (["--steps", "7"], {"steps": 7}),
        (["--rate", "0.5"], {"rate": 0.5}),
        (["--is-verbose"], {"is_verbose": True}),
        (["--no-is-verbose"], {"is_verbose": False}),
    ],
)
def test_only_given_options_are_read(words: list[str], given: dict[str, object]) -> None:
    arguments = vars(build_parser().parse_args(words))
    assert read_config_arguments(Sizes, arguments) == given
