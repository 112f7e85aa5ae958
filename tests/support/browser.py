"""Headless Chromium, driven over the DevTools protocol."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

from conditions import wait_for
from processes import Starter, require
from websocket import create_connection

#: Where screenshots are kept for someone to look at; without it they are only taken.
SHOTS = os.environ.get("PASSENGER_SCREENSHOTS", "")


class Page:
    """One tab of a browser."""

    def __init__(self, url: str) -> None:
        self.socket = create_connection(url, timeout=60, suppress_origin=True)
        self.numbers = itertools.count(1)
        self.events: list[dict[str, Any]] = []
        #: what the page gets instead of the responses of other hosts
        self.responses: dict[str, bytes] = {}
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def _send(self, method: str, **params: Any) -> int:
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": params}))
        return number

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        number = self._send(method, **params)
        while True:
            message: dict[str, Any] = json.loads(self.socket.recv())
            assert "error" not in message, message
            if message.get("id") == number:
                result: dict[str, Any] = message["result"]
                return result
            if message.get("method") == "Fetch.requestPaused":
                self._respond(message["params"])
            if "method" in message:
                self.events.append(message)

    def serve(self, url: str, script: bytes) -> None:
        """Have the page get this script for a URL of a host that the tests do not reach."""
        self.responses[url] = script
        self.call("Fetch.enable", patterns=[{"urlPattern": url} for url in self.responses])

    def _respond(self, paused: dict[str, Any]) -> None:
        self._send(
            "Fetch.fulfillRequest",
            requestId=paused["requestId"],
            responseCode=200,
            responseHeaders=[{"name": "Content-Type", "value": "text/javascript"}],
            body=base64.b64encode(self.responses[paused["request"]["url"]]).decode(),
        )

    def open(
        self, url: str, width: int = 1280, height: int = 900, dark: bool = False, shows: str = "body"
    ) -> None:
        """Load a page, until all of its files are there and something matches the CSS selector ``shows``."""
        self.resize(width, height)
        scheme = "dark" if dark else "light"
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=url)
        complete = (
            f"document.readyState === 'complete' && document.querySelector({json.dumps(shows)}) !== null"
        )
        wait_for(lambda: self.run(complete), f"{shows} on {url}")

    def resize(self, width: int, height: int = 900) -> None:
        """Make the window another one; below 500 pixels it is a telephone's."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 500,
        )

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def type(self, selector: str, text: str) -> None:
        """Click on a field, type a line into it, and press Enter, in the tab that is in front."""
        self.call("Page.bringToFront")
        at = self.run(f"(({{x, y, width, height}}) => ({{x: x + width / 2, y: y + height / 2}}))"
                      f"(document.querySelector('{selector}').getBoundingClientRect())")  # fmt: skip
        for event in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=event, button="left", clickCount=1, **at)
        self.call("Input.insertText", text=text)
        enter = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13}
        self.call("Input.dispatchKeyEvent", type="keyDown", text="\r", **enter)
        self.call("Input.dispatchKeyEvent", type="keyUp", **enter)

    def text(self) -> str:
        return str(self.run("document.body.innerText"))

    def requests(self) -> list[str]:
        self.run("1")  # reads what has come
        return [
            e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"
        ]

    def complaints(self) -> list[dict[str, Any]]:
        """What the browser's console shows."""
        self.run("1")
        return [e for e in self.events if e["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")]

    def shot(self, name: str) -> None:
        """Take a picture of the whole page."""
        picture = base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])
        assert picture.startswith(b"\x89PNG")
        if SHOTS:
            with open(f"{SHOTS}/{name}.png", "wb") as file:
                file.write(picture)


@contextlib.contextmanager
def chromium(start: Starter) -> Iterator[Callable[[], Page]]:
    """A browser of the test's own; calling what it yields opens a tab."""
    program = start.run(
        require("chromium"), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
        "--remote-debugging-port=0", f"--user-data-dir={start.home}/chromium", "--no-first-run",
        "--disable-background-networking", "about:blank",
        # where Chromium leaves a directory behind
        env={"TMPDIR": start.home},
    )  # fmt: skip
    url = program.wait_log(r"DevTools listening on ws://(\S+?)/").group(1)
    pages: list[Page] = []

    def new() -> Page:
        request = urllib.request.Request(f"http://{url}/json/new?about:blank", method="PUT")
        with urllib.request.urlopen(request, timeout=60) as response:
            pages.append(Page(json.load(response)["webSocketDebuggerUrl"]))
        return pages[-1]

    yield new
    for page in pages:
        with contextlib.suppress(Exception):
            page.socket.close()
    program.signal(15)
    program.wait_end()
    wait_for(lambda: not program.session(), "the browser's processes")
