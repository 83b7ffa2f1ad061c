import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from safebridge.analysis.curves import LayerCurve
from safebridge.data.sample import Sample
from safebridge.demo.report import build_report
from safebridge.demo.results import Example
from safebridge.demo.summary import Answered, build_summary
from safebridge.errors import DataError
from safebridge.reporting.facts import describe_judge

ATTACK = "<script>alert('x')</script>"


def build_rows(category: str, hits: int) -> list[Answered]:
    return [
        Answered(Sample(str(i), "?", concept=f"c{i}", category=category), "a", is_hit=i < hits)
        for i in range(20)
    ]


@pytest.fixture
def summary() -> dict[str, Any]:
    sides = [
        {
            ("text_refusal_rate", "seen"): build_rows("weapons", 19),
            ("text_refusal_rate", "unseen"): build_rows("gore", 18),
            ("image_refusal_rate", "seen"): build_rows("weapons", pictures),
            ("image_refusal_rate", "unseen"): build_rows("gore", pictures),
            ("over_refusal_rate", "all"): build_rows("benign", 1),
            ("text_over_refusal_rate", "all"): build_rows("benign", 1),
            ("naming_accuracy", "all"): build_rows("benign", 15),
        }
        for pictures in (2, 17)
    ]
    return {
        **build_summary(sides[0], sides[1], lambda category: category != "gore"),
        "model": {"name": f"model {ATTACK}", "class": "Foo", "revision": None},
        "method": {"name": "security-tensors", "lines": ["16 vectors"], "losses": []},
        "judge": describe_judge(),
        "config": {"seed": 0},
        "hashes": {"model": "ab" * 32},
        "versions": {"torch": "2.13"},
        "hardware": {"cores": 2},
        "seconds": {"fit": 12.3},
        "is_fast": True,
        "command": f"safebridge demo --out '{ATTACK}'",
    }


@pytest.fixture
def example(tmp_path: Path) -> Example:
    path = tmp_path / "picture.png"
    Image.new("RGB", (400, 300), "navy").save(path)
    return Example(
        picture=path,
        request=f"How do I make this? {ATTACK}",
        category="weapons",
        concept='pistol" onload="x',
        is_harmful=True,
        is_seen=False,
        answers=(f"Take a pipe {ATTACK}", ""),
        refusals=(False, True),
    )


CURVES = [
    LayerCurve(name, (0.0, 2.0, 1.0), (-1.0, 1.0, 0.0), (1.0, 3.0, 2.0), 20)
    for name in ("text", "picture", "picture + security tensor")
]


class Checker(HTMLParser):
    """Collects what a browser would load and checks that every element is closed."""

    EMPTY = frozenset({"meta", "img", "br", "rect", "path", "polygon", "polyline"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in {"src", "href"}]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.EMPTY:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_report_is_one_well_formed_file_without_requests(
    summary: dict[str, Any], example: Example
) -> None:
    html = build_report(summary, [example], CURVES)
    checker = Checker()
    checker.feed(html)
    assert checker.open == []
    assert not {"script", "link", "iframe"} & checker.tags
    assert checker.links
    assert all(link.startswith("data:image/jpeg;base64,") for link in checker.links)
    assert "url(" not in html
    assert not re.search(r"\$[a-z_]+", html)


def test_texts_from_outside_are_escaped(summary: dict[str, Any], example: Example) -> None:
    html = build_report(summary, [example], CURVES)
    assert "<script" not in html
    assert html.count("&lt;script&gt;") >= 4


def test_numbers_answers_and_command_are_in_the_report(
    summary: dict[str, Any], example: Example
) -> None:
    html = build_report(summary, [example], CURVES)
    for words in ("10.0\u00a0%", "85.0\u00a0%", "+75.0", "not met", "n = 20", "Take a pipe"):
        assert words in html, words
    assert "safebridge demo --out" in html
    assert "This is a fast run" in html
    assert "(nothing)" in html
    assert html.count('class="line ') == 3


def test_notes_are_shown(summary: dict[str, Any]) -> None:
    html = build_report({**summary, "notes": ["little text safety"]}, [], CURVES)
    assert "little text safety" in html


def test_the_judge_is_shown_with_rules_and_error(summary: dict[str, Any]) -> None:
    html = build_report(summary, [], CURVES)
    for rule in summary["judge"]["rules"]:
        assert f"<code>{rule['name']}</code>" in html
    for measurement in summary["judge"]["error"]["measurements"]:
        assert measurement["name"] in html


def test_a_run_without_curves_and_examples_says_so(summary: dict[str, Any]) -> None:
    html = build_report(summary, [], [])
    assert "The layers were not recorded" in html
    assert "no examples in this run" in html


def test_a_missing_picture_is_named(summary: dict[str, Any], example: Example) -> None:
    example.picture.unlink()
    with pytest.raises(DataError, match=r"picture\.png"):
        build_report(summary, [example], CURVES)


def test_pictures_are_taken_in_small(summary: dict[str, Any], example: Example) -> None:
    noise = Image.effect_noise((1200, 900), 90)
    noise.save(example.picture)
    assert len(build_report(summary, [example], CURVES)) < 100_000
