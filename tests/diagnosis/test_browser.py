"""The report in a real browser: no errors, no overflow on a phone, and everything by keyboard."""

import asyncio
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
aiohttp = pytest.importorskip("aiohttp", reason="the browser is spoken to by aiohttp's websockets")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here: apt-get install chromium"
)

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--remote-debugging-port=0",
)  # fmt: skip
TIMEOUT_SECONDS = 120

Diagnosis = tuple[Path, dict[str, Any]]
Evaluate = Callable[[str], Awaitable[Any]]


class Tab:
    """One page, spoken to by the DevTools protocol."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self.errors: list[str] = []

    async def send(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": params})
        while True:
            message = json.loads((await self._socket.receive()).data)
            if message.get("method") == "Runtime.exceptionThrown":
                self.errors.append(json.dumps(message["params"]))
            if message.get("method") == "Log.entryAdded":
                self.errors.append(json.dumps(message["params"]["entry"]))
            if message.get("id") == number:
                assert "error" not in message, message
                return dict(message["result"])

    async def run(self, code: str) -> Any:
        found = await self.send("Runtime.evaluate", expression=code, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def open(self, page: Path, width: int) -> None:
        for domain in ("Page", "Runtime", "Log"):
            await self.send(f"{domain}.enable")
        await self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=900, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        await self.send("Page.navigate", url=page.as_uri())
        for _ in range(10 * TIMEOUT_SECONDS):
            if await self.run("document.documentElement?.dataset.ready") == "yes":
                return
            await asyncio.sleep(0.1)
        pytest.fail("the page's script did not run to its end")

    async def press(self, key: str) -> None:
        codes = {"Enter": 13, "Tab": 9, "ArrowRight": 39, "ArrowDown": 40, "End": 35, " ": 32}
        text = {"text": "\r" if key == "Enter" else key} if key in {"Enter", " "} else {}
        for kind in ("keyDown", "keyUp"):
            await self.send(
                "Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=codes[key],
                **(text if kind == "keyDown" else {}),
            )  # fmt: skip


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    folder = tmp_path_factory.mktemp("browser")
    assert CHROMIUM is not None
    process = subprocess.Popen(  # noqa: S603 - the browser that was found
        [CHROMIUM, *FLAGS, f"--user-data-dir={folder}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "HOME": str(folder)},
    )
    try:
        yield wait_for_port(folder / "DevToolsActivePort")
    finally:
        process.terminate()
        process.wait(timeout=30)


def wait_for_port(path: Path) -> int:
    for _ in range(10 * TIMEOUT_SECONDS):
        if path.is_file() and path.read_text().count("\n"):
            return int(path.read_text().splitlines()[0])
        time.sleep(0.1)
    pytest.fail("the browser did not start")


def use(port: int, page: Path, width: int, job: Callable[[Tab], Awaitable[None]]) -> None:
    async def main() -> None:
        base = f"http://127.0.0.1:{port}"
        async with aiohttp.ClientSession() as session:
            async with session.put(f"{base}/json/new?about:blank") as answer:
                target = await answer.json()
            async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                tab = Tab(socket)
                await tab.open(page, width)
                await job(tab)
                assert tab.errors == []
            async with session.get(f"{base}/json/close/{target['id']}"):
                pass

    asyncio.run(asyncio.wait_for(main(), timeout=TIMEOUT_SECONDS))


@pytest.mark.parametrize("width", [375, 1280])
def test_nothing_sticks_out_and_nothing_fails(port: int, diagnosis: Diagnosis, width: int) -> None:
    async def job(tab: Tab) -> None:
        await tab.run("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        assert await tab.run("document.documentElement.scrollWidth") <= width
        outside = await tab.run(
            "[...document.querySelectorAll('main *')].filter((one) => !one.closest('.scroll, pre, "
            "svg') && one.getBoundingClientRect().right > innerWidth + 1).map((one) => "
            "one.tagName + '.' + one.className).join(' ')"
        )
        assert outside == ""
        small = await tab.run(
            "[...document.querySelectorAll('select, .veil')].filter((one) => "
            "one.getBoundingClientRect().height < 44).length"
        )
        assert small == 0

    use(port, diagnosis[0] / "report.html", width, job)


def test_a_chart_answers_to_pointer_and_keys(port: int, diagnosis: Diagnosis) -> None:
    async def job(tab: Tab) -> None:
        chart = "document.querySelector('.chart[data-key=angular_gap]')"
        readout = f"{chart}.querySelector('.readout').textContent"
        await tab.run(f"{chart}.scrollIntoView(); {chart}.focus()")
        await tab.press("ArrowRight")
        assert (await tab.run(readout)).startswith("layer 0: text ")
        await tab.press("End")
        assert (await tab.run(readout)).startswith("layer 3: text ")
        box = await tab.run(
            f"(({{left, top, width, height}}) => ({{left, top, width, height}}))"
            f"({chart}.querySelector('.plot').getBoundingClientRect())"
        )
        await tab.send(
            "Input.dispatchMouseEvent", type="mouseMoved", x=box["left"] + box["width"] * 0.34,
            y=box["top"] + box["height"] / 2,
        )  # fmt: skip
        assert (await tab.run(readout)).startswith("layer 1: text ")
        head = "document.querySelector('.map')"
        await tab.run(f"{head}.focus()")
        await tab.press("ArrowRight")
        await tab.press("ArrowDown")
        said = await tab.run(f"{head}.querySelector('.readout').textContent")
        assert said.startswith("layer 1, head 0: ")

    use(port, diagnosis[0] / "report.html", 1280, job)


def test_a_picture_is_unveiled_by_key_and_veiled_again(port: int, diagnosis: Diagnosis) -> None:
    async def job(tab: Tab) -> None:
        veil = "document.querySelector('.sample[data-kind=harmful] .veil')"
        blur = f"getComputedStyle({veil}.querySelector('img')).filter"
        await tab.run(f"{veil}.closest('details').querySelector('summary').focus()")
        await tab.press("Enter")
        assert await tab.run(f"{veil}.closest('details').open")
        await tab.press("Tab")
        assert await tab.run(f"document.activeElement === {veil}")
        assert "blur" in await tab.run(blur)
        await tab.press(" ")
        assert await tab.run(blur) == "none"
        await tab.press(" ")
        assert "blur" in await tab.run(blur)

    use(port, diagnosis[0] / "report.html", 1280, job)


def test_filters_leave_what_was_asked_for(port: int, diagnosis: Diagnosis) -> None:
    async def job(tab: Tab) -> None:
        async def choose(name: str, value: str) -> None:
            await tab.run(
                f"(() => {{ const one = document.querySelector('[data-filter={name}]'); "
                f"one.value = '{value}'; one.dispatchEvent(new Event('change')); }})()"
            )

        shown = "[...document.querySelectorAll('.sample:not([hidden])')].map((one) => {})"
        await choose("kind", "harmful")
        assert await tab.run(shown.format("one.dataset.kind")) == ["harmful"] * 2
        await choose("category", "poison")
        kinds = await tab.run(shown.format("one.dataset.category"))
        assert set(kinds) <= {"poison"}
        rows = await tab.run(
            "[...document.querySelectorAll('.bar-row[data-category]:not([hidden])')]"
            ".map((one) => one.dataset.category)"
        )
        assert rows == ["poison", "poison"]
        count = await tab.run("document.getElementById('sample-count').textContent")
        assert count == f"{len(kinds)} shown"

    use(port, diagnosis[0] / "report.html", 1280, job)
