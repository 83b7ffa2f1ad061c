from pathlib import Path

import pytest

from safebridge.data.sample import Sample


@pytest.fixture(scope="session")
def guided(pictures: list[Path]) -> list[Sample]:
    """Five samples with a picture and one, the last, without."""
    return [
        Sample(
            id=str(number),
            prompt="What?" + "!" * (number % 3),
            images=(pictures[number % 4],) if number < 5 else (),
            answer="A cat.",
            caption=f"A cat on mat {number}" if number < 5 else "",
            retrieved="A dog sits" + "." * number if number < 5 else "",
        )
        for number in range(6)
    ]
