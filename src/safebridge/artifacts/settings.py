"""Settings of a method, rebuilt from the JSON of an artifact."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from safebridge.errors import SettingError

__all__ = ["rebuild_settings"]

SettingsT = TypeVar("SettingsT")


def rebuild_settings(
    settings_class: type[SettingsT], values: Mapping[str, Any], name: str
) -> SettingsT:
    """Rebuild a settings dataclass, refusing missing and unknown names.

    Args:
        settings_class: The dataclass; it checks the values itself.
        values: What `dataclasses.asdict` returned.
        name: Whose settings they are, for the error, e.g. "a security tensor".

    Raises:
        SettingError: If a setting is missing, unknown or out of range.
    """
    names = {item.name for item in fields(settings_class)}  # type: ignore[arg-type]
    missing, unknown = sorted(names - set(values)), sorted(set(values) - names)
    if missing or unknown:
        raise SettingError(
            f"settings of {name}: missing {missing}, unknown {unknown}. They were written by "
            "another version; fit and save again."
        )
    return settings_class(**values)
