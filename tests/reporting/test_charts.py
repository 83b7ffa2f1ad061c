import re

import pytest

from safebridge.analysis.curves import LayerCurve
from safebridge.reporting.charts import draw_bars, draw_curves, to_percent


def build_rate(value: float) -> dict[str, float]:
    return {"value": value, "low": max(0.0, value - 0.1), "high": min(1.0, value + 0.1), "n": 20}


def test_percentages_keep_one_digit_and_nothing_is_a_dash() -> None:
    assert to_percent(0.9333) == "93.3\u00a0%"
    assert to_percent(None) == "\u2013"


def test_bars_are_as_long_as_the_rates() -> None:
    html = draw_bars("Refused", [("weapons", "seen", build_rate(0.25), build_rate(0.875))])
    assert re.findall(r'class="(base|defended)" width="([\d.]+)"', html) == [
        ("base", "25.00"),
        ("defended", "87.50"),
    ]
    assert "n = 20" in html
    assert "M15.00 5H35.00" in html


def test_labels_are_escaped() -> None:
    html = draw_bars("<b>", [("<i>", "<u>", build_rate(0.5), build_rate(0.5))])
    assert not re.search(r"<[biu]>", html)


def build_curve(values: tuple[float, ...]) -> LayerCurve:
    return LayerCurve("text", values, values, values, 4)


def test_a_line_goes_from_the_first_layer_to_the_last() -> None:
    html = draw_curves([build_curve((0.0, 4.0, 8.0))], ["text"], "angle")
    assert 'points="0.00,100.00 50.00,50.00 100.00,0.00"' in html


@pytest.mark.parametrize("values", [(0.0,), (0.0, 0.0), (-3.0, -1.0), (1e-9, 1e3), (12.0, 75.5)])
def test_every_line_stays_inside_the_plot(values: tuple[float, ...]) -> None:
    html = draw_curves([build_curve(values)], ["text"], "angle")
    points = re.findall(r'polyline class="line text" points="([^"]+)"', html)[0].split()
    for point in points:
        assert all(0 <= float(number) <= 100 for number in point.split(","))
    ticks = re.findall(r'class="y"', html)
    assert 4 <= len(ticks) <= 16
