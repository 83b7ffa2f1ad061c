"""What Inspect AI finds through the entry point: the provider and the suites, without torch."""

from typing import Any

from inspect_ai.model import modelapi

from safebridge.evaluation.suites import naming, twins

__all__ = ["naming", "safebridge", "twins"]


@modelapi(name="safebridge")
def safebridge() -> Any:
    """Return the provider of `safebridge/<model>`, importing torch only now."""
    from safebridge.evaluation.provider import SafebridgeAPI  # noqa: PLC0415 - slow import

    return SafebridgeAPI
