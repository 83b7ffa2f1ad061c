"""The report: nothing from outside runs or loads, pictures are veiled, numbers are the run's."""

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from safebridge.data.sample import Sample
from safebridge.diagnosis.charts import _shade, draw_bar_rows
from safebridge.diagnosis.page import build_page
from safebridge.diagnosis.plan import build_cases, find_twins
from safebridge.diagnosis.report import build_report, read_curves, read_records
from safebridge.diagnosis.results import Record, Reply

Diagnosis = tuple[Path, dict[str, Any]]
ATTACK = "</script><script>alert('x')</script>"


class Checker(HTMLParser):
    """Collects what a browser would load and checks that every element is closed."""

    EMPTY = frozenset({"meta", "img", "br", "rect", "path", "polygon", "polyline", "circle"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in {"src", "href", "srcset"}]
        self.scripts += tag == "script"
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.EMPTY:
            assert self.open.pop() == tag


def check(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert all(link.startswith("data:image/webp;base64,") for link in checker.links)
    assert checker.scripts == 2
    return checker


@pytest.fixture
def page(diagnosis: Diagnosis) -> str:
    return (diagnosis[0] / "report.html").read_text()


def test_the_page_is_whole_and_loads_nothing(page: str) -> None:
    checker = check(page)
    assert len(checker.links) == 4 * 3
    assert "http" not in re.sub(r'xmlns="[^"]*"', "", page).replace("http-equiv", "")
    assert "$" not in re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)


def test_only_the_pages_own_script_may_run(page: str) -> None:
    script = page.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page
    assert "default-src 'none'" in page


def test_texts_from_outside_are_shown_and_do_not_run(
    diagnosis: Diagnosis, samples: list[Sample], tmp_path: Path
) -> None:
    twins = [replace(one, text=replace(one.text, prompt=ATTACK)) for one in find_twins(samples)]
    cases = build_cases(twins[:2], tmp_path)
    replies = {ATTACK: {}, "base": {"text": [Reply(ATTACK, "answer", "none")] * 2}}
    summary = json.loads(json.dumps(diagnosis[1]))
    summary["model"]["name"] = summary["command"] = ATTACK
    summary["verdict"][0]["text"] = ATTACK
    summary["curves"][0]["curves"][0]["name"] = ATTACK
    page = build_report(summary, cases, replies, shown=2)
    check(page)
    assert "alert" in page
    assert "<script>alert" not in page


def test_harmful_pictures_are_veiled_and_harmless_ones_are_not(page: str) -> None:
    veils = re.findall(r'<button type="button" class="veil" aria-pressed="(\w+)"', page)
    # Two harmful requests are shown, each with its picture and its words.
    assert veils == ["false"] * 4
    assert page.count('data-kind="harmful"') == page.count('data-kind="harmless"') == 2


def test_the_numbers_of_the_page_are_those_of_the_run(diagnosis: Diagnosis, page: str) -> None:
    _, summary = diagnosis
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    for figure in summary["curves"]:
        assert data["curves"][figure["key"]]["curves"][0]["values"] == list(
            figure["curves"][0]["values"]
        )
    for finding in summary["verdict"]:
        assert finding["text"].replace("'", "&#x27;") in page.replace('"', "&quot;")
    assert "&lt;again&gt;" in page


def test_numbers_and_curves_survive_json(diagnosis: Diagnosis) -> None:
    summary = json.loads(json.dumps(diagnosis[1]))
    assert [one.to_json() for one in read_records(summary)] == summary["records"]
    figures = read_curves(summary)
    assert figures[0].curves[0].values == tuple(summary["curves"][0]["curves"][0]["values"])


def test_bars_are_as_long_as_the_rates() -> None:
    rate = Record("base", "text", "refusal_rate", "validation", 0.25, 0.1, 0.5, 20, (0,))
    html = draw_bar_rows([("text", "weapons", [rate, None])], ["base", "other"])
    assert 'width="25.00"' in html
    assert 'data-category="weapons"' in html
    assert html.count('class="bar"') == 1


def test_shades_grow_lighter() -> None:
    lightness = [
        sum(int(_shade(value / 20)[i : i + 2], 16) for i in (1, 3, 5)) for value in range(10, 21)
    ]
    assert lightness == sorted(lightness)
    assert _shade(0.2) == _shade(0.5)
    assert _shade(1.0) == "#fde725"


def test_data_cannot_end_its_element() -> None:
    page = build_page(title="a", lead="b", body="", data={"name": ATTACK})
    assert json.loads(page.partition('id="data">')[2].partition("</script>")[0])["name"] == ATTACK
