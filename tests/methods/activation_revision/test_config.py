"""Settings: ranges, layers, automatic values, JSON."""

from typing import Any

import pytest

from safebridge.errors import SettingError
from safebridge.methods.activation_revision.config import ActivationRevisionConfig as Config


@pytest.mark.parametrize(
    ("values", "advice"),
    [
        ({"level": "token"}, 'Choose "head" or "layer"'),
        ({"scope": "some"}, 'Choose "last_and_decode"'),
        ({"top_k": -1}, "must not be negative"),
        ({"batch_size": 0}, "at least 1"),
        ({"validation_ratio": 1.0}, "between 0 and 1"),
        ({"inverse_regularisation": 0.0}, "above 0"),
        ({"layers": "a-b"}, "cannot be read"),
        ({"layers": "5-3"}, "not there"),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, Any], advice: str) -> None:
    with pytest.raises(SettingError, match=advice):
        Config(**values)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", None), ("0-2", (0, 1, 2)), ("3, 1", (1, 3)), ("-1", (3,)), ("0,2-3", (0, 2, 3))],
)
def test_layers_are_named_by_numbers_and_ranges(text: str, expected: Any) -> None:
    assert Config(layers=text).parse_layers(4) == expected


def test_layers_that_the_model_lacks_are_refused() -> None:
    with pytest.raises(SettingError, match="from 0 to 3"):
        Config(layers="2-7").parse_layers(4)


def test_automatic_values_are_itis_at_head_level() -> None:
    assert Config().count_sites(1024) == 48
    assert (Config().unit, Config().factor) == ("sigma", 15.0)
    layer = Config(level="layer")
    assert layer.count_sites(32) == 8
    assert (layer.unit, layer.factor) == ("mean_difference", 1.0)
    assert Config(top_k=5).count_sites(3) == 3
    assert Config(alpha=2.0).factor == 2.0


def test_settings_survive_json_and_strange_ones_are_refused() -> None:
    config = Config(level="layer", top_k=3)
    assert Config.from_dict(config.to_dict()) == config
    with pytest.raises(SettingError, match="fit and save again"):
        Config.from_dict({**config.to_dict(), "colour": 1})
