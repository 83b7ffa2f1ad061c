import json
from pathlib import Path
from typing import Any

import pytest

from safebridge.cli.fields import describe_fields, read_config
from safebridge.errors import SettingError, ShapeError
from safebridge.methods.text_guided_alignment.config import (
    TextGuidedAlignmentConfig,
    parse_layers,
)


def test_every_field_has_a_docstring() -> None:
    assert set(describe_fields(TextGuidedAlignmentConfig)) == set(
        TextGuidedAlignmentConfig().to_dict()
    )


def test_settings_survive_json() -> None:
    config = TextGuidedAlignmentConfig(form="repository", layers="9-17", pair_weight=0.5)
    assert TextGuidedAlignmentConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("values", "advice"),
    [
        ({"form": "thesis"}, 'Choose "paper" or "repository"'),
        ({"batch_size": 0}, "at least 1"),
        ({"learning_rate": 0.0}, "above 0"),
        ({"align_weight": -1.0}, "must not be negative"),
        ({"retrieved": "none"}, "pair_weight=0"),
        ({"retrieved_format": "Text: "}, "needs {}"),
        ({"answer_weight": 0.0, "is_guide_detached": True}, "Raise answer_weight"),
        ({"answer_weight": 0.0, "align_weight": 0.0, "pair_weight": 0.0}, "Raise answer_weight"),
        (
            {"answer_weight": 0.0, "guide_trains": "projector", "trainable": "full"},
            'Use trainable="projector"',
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(values: dict[str, Any], advice: str) -> None:
    with pytest.raises(SettingError, match=advice):
        TextGuidedAlignmentConfig(**values)


def test_settings_that_came_later_may_be_missing() -> None:
    values = TextGuidedAlignmentConfig().to_dict()
    del values["guide_trains"]
    assert TextGuidedAlignmentConfig.from_dict(values) == TextGuidedAlignmentConfig()


def test_missing_and_unknown_settings_are_named() -> None:
    values = TextGuidedAlignmentConfig().to_dict() | {"temperature": 1.0}
    del values["seed"]
    with pytest.raises(SettingError, match=r"missing \['seed'\], unknown \['temperature'\]"):
        TextGuidedAlignmentConfig.from_dict(values)


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("all", tuple(range(32))),
        ("9-17", tuple(range(9, 18))),
        ("17,3, 5-6,3", (3, 5, 6, 17)),
        ("0.28-0.56", tuple(range(9, 18))),  # the repository's layers 10 to 18, counted from 1
        ("0.99-1.0", (31,)),
    ],
)
def test_layers_are_read(text: str, layers: tuple[int, ...]) -> None:
    assert parse_layers(text, 32) == layers


@pytest.mark.parametrize("text", ["", "nine", "5-", "0.5", "0.7-0.3", "1.5-2.0"])
def test_unreadable_layers_say_how_to_write_them(text: str) -> None:
    with pytest.raises(SettingError, match="numbers and ranges such as"):
        parse_layers(text, 32)


@pytest.mark.parametrize("text", ["3,32", "9-3"])
def test_layers_that_the_model_lacks_are_refused(text: str) -> None:
    with pytest.raises(ShapeError, match="layers 0 to 31"):
        parse_layers(text, 32)


def test_text_states_are_constant_only_where_nothing_changes_them() -> None:
    make = TextGuidedAlignmentConfig
    assert make(trainable="projector").is_text_state_constant
    assert make(trainable="full", teacher="base").is_text_state_constant
    assert not make(trainable="projector+lora").is_text_state_constant


RECIPES = sorted((Path(__file__).parents[3] / "recipes/text_guided_alignment").glob("*.json"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_settings(path: Path) -> None:
    config = read_config(TextGuidedAlignmentConfig, path, {})
    given = json.loads(path.read_text())
    assert {name: config.to_dict()[name] for name in given} == given
    assert len(RECIPES) == 4
