import ast
import inspect
import textwrap
from dataclasses import fields
from itertools import pairwise

import pytest

from safebridge.errors import SettingError
from safebridge.methods.security_tensors.config import SecurityTensorsConfig


def test_every_field_has_a_text_under_it() -> None:
    tree = ast.parse(textwrap.dedent(inspect.getsource(SecurityTensorsConfig)))
    body = tree.body[0].body  # type: ignore[attr-defined]
    texts = {
        statement.target.id
        for statement, below in pairwise(body)
        if isinstance(statement, ast.AnnAssign) and isinstance(below, ast.Expr)
    }
    assert texts == {field.name for field in fields(SecurityTensorsConfig)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modality": "audio"}, '"textual" or "visual" or "both"'),
        ({"position": "end"}, '"prefix" or "after_image"'),
        ({"benign_loss": "mse"}, '"ce" or "kl"'),
        ({"order": "pixels"}, '"joint" or "textual_first" or "visual_first"'),
        ({"max_change_pixels_255": -1.0}, "must not be negative"),
        ({"applies_to": "text"}, '"all" or "pictures"'),
        ({"init": "text"}, "do not go together"),
        ({"init_text": "Be careful."}, "do not go together"),
        ({"num_virtual_tokens": 0}, "must be at least 1"),
        ({"learning_rate": 0.0}, "must be above 0"),
        ({"learning_rate": float("nan")}, "must be above 0"),
        ({"weight_tcb": -1.0}, "must not be negative"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        SecurityTensorsConfig(**options)  # type: ignore[arg-type]


def test_settings_survive_a_round_trip_and_strangers_do_not() -> None:
    config = SecurityTensorsConfig(num_virtual_tokens=7, benign_loss="kl")
    values = config.to_dict()
    assert SecurityTensorsConfig.from_dict(values) == config
    del values["seed"]
    values["threshold"] = 1
    with pytest.raises(SettingError, match=r"missing \['seed'\], unknown \['threshold'\]"):
        SecurityTensorsConfig.from_dict(values)


def test_settings_of_the_first_release_are_read_as_they_were_meant() -> None:
    values = SecurityTensorsConfig(benign_loss="kl", kl_top_k=0).to_dict()
    later = {"order", "visual_side", "max_change_pixels_255", "kl_top_k",
             "is_gradient_checkpointed"}  # fmt: skip
    first = {name: value for name, value in values.items() if name not in later}
    assert SecurityTensorsConfig.from_dict(first).to_dict() == values
