"""Turns a config dataclass into command-line options; the field docstrings are the help."""

import argparse
import ast
import inspect
import json
import textwrap
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from safebridge.errors import SettingError

__all__ = ["add_config_arguments", "describe_fields", "read_config", "read_config_arguments"]

ConfigT = TypeVar("ConfigT")

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


def read_config(
    config_class: type[ConfigT], path: Path | None, arguments: Mapping[str, Any]
) -> ConfigT:
    """Build a config from a JSON file and the command line, which takes precedence.

    Args:
        config_class: The dataclass that `add_config_arguments` was called with.
        path: A JSON object with any of its fields; None gives the defaults.
        arguments: The parsed arguments, e.g. `vars(namespace)`.

    Raises:
        SettingError: If the file is no JSON object or names an unknown field, or a value has
            another type or is out of range.
    """
    values = {} if path is None else _read_settings(path, get_type_hints(config_class))
    return config_class(**{**values, **read_config_arguments(config_class, arguments)})


def _read_settings(path: Path, types: Mapping[str, Any]) -> dict[str, Any]:
    """Read a JSON object of settings and check their names and types."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SettingError(f"{path} is no JSON ({error}). Write an object of settings.") from error
    if not isinstance(values, dict):
        raise SettingError(f"{path} is no JSON object. Write names and values of settings in one.")
    for name, value in values.items():
        if name not in types:
            raise SettingError(
                f"{path}: there is no setting '{name}'. Known: {', '.join(sorted(types))}."
            )
        expected = types[name]
        if expected is float and type(value) is int:
            values[name] = float(value)
            continue
        if expected in {bool, *_PARSERS} and type(value) is not expected:
            raise SettingError(
                f"{path}: {name} is {value!r}, expected {expected.__name__}. Correct it."
            )
    return values


def _default_of(field: Field[Any]) -> Any:
    if field.default is not MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not MISSING else "none"
