"""Turns a config dataclass into command-line options; the field docstrings are the help."""

import argparse
import ast
import inspect
import textwrap
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from itertools import pairwise
from typing import Any, get_type_hints

__all__ = ["add_config_arguments", "describe_fields", "read_config_arguments"]

_PARSERS: dict[Any, type] = {int: int, float: float, str: str}


def describe_fields(config_class: type) -> dict[str, str]:
    """Return the docstring that stands under each field of a dataclass.

    Python drops these strings when it compiles, so they are read from the source.

    Args:
        config_class: A dataclass with one string under each field.

    Returns:
        Field names to their text on one line; a field without text is absent.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(config_class)))
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    texts: dict[str, str] = {}
    for statement, below in pairwise(body):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
            and isinstance(below.value.value, str)
        ):
            texts[statement.target.id] = " ".join(below.value.value.split())
    return texts


def add_config_arguments(parser: argparse.ArgumentParser, config_class: type, title: str) -> None:
    """Add one option per int, float, str or bool field of a config.

    An option that is not given leaves no trace in the parsed arguments, so that
    `read_config_arguments` can tell it from one that repeats the default.

    Args:
        parser: Receives a group of options.
        config_class: A dataclass whose fields have defaults and docstrings.
        title: Heading of the group in the help.
    """
    group = parser.add_argument_group(title)
    texts = describe_fields(config_class)
    types = get_type_hints(config_class)
    for field in fields(config_class):
        flag = "--" + field.name.replace("_", "-")
        text = texts.get(field.name, "").replace("%", "%%")
        help_text = f"{text} Default: {_default_of(field)}." if text else None
        if types[field.name] is bool:
            group.add_argument(
                flag,
                action=argparse.BooleanOptionalAction,
                default=argparse.SUPPRESS,
                help=help_text,
            )
        elif types[field.name] in _PARSERS:
            group.add_argument(
                flag,
                type=_PARSERS[types[field.name]],
                metavar=_PARSERS[types[field.name]].__name__.upper(),
                default=argparse.SUPPRESS,
                help=help_text,
            )


def read_config_arguments(config_class: type, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a config that were given on the command line.

    Args:
        config_class: The dataclass that `add_config_arguments` was called with.
        arguments: The parsed arguments, e.g. `vars(namespace)`.
    """
    return {
        field.name: arguments[field.name]
        for field in fields(config_class)
        if field.name in arguments
    }


def _default_of(field: Field[Any]) -> Any:
    if field.default is not MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not MISSING else "none"
