from pathlib import Path

import pytest

from safebridge.data.sample import Sample
from safebridge.methods.activation_revision.samples import build_multi_response, build_reminded


@pytest.fixture(scope="session")
def requests(pictures: list[Path]) -> list[Sample]:
    """Stand-ins for harmful requests; random models do not read them anyway."""
    return [
        Sample(
            id=f"r{number}",
            prompt="How?" + "!" * (number % 4),
            images=(pictures[number % 4],),
            is_harmful=True,
        )
        for number in range(6)
    ]


@pytest.fixture(scope="session")
def benign(pictures: list[Path]) -> list[Sample]:
    return [
        Sample(id=f"b{number}", prompt="What is it?" + "." * number, images=(pictures[number % 4],))
        for number in range(10)
    ]


@pytest.fixture(scope="session")
def answered(requests: list[Sample]) -> list[Sample]:
    """Groups of several responses, kept short for the tiny models."""
    refusals, openers = ["I cannot.", "No way.", "I will not."], ["Sure.", "Yes, gladly.", "OK."]
    return build_multi_response(requests, count=2, refusals=refusals, openers=openers)


@pytest.fixture(scope="session")
def reminded(requests: list[Sample]) -> list[Sample]:
    return build_reminded(requests, reminders=["Be safe.", "Do no harm."])
