"""A real headless Chromium, driven by the DevTools protocol over the websocket that comes with Dask."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

from tornado.httpclient import HTTPRequest
from tornado.websocket import WebSocketClientConnection, websocket_connect

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
START_SECONDS = 60.0
# No sandbox: CI runs as root in a container, which has none to offer; the pages are our own. No calls home.
_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--disable-sync",
    "--no-first-run",
    "--no-default-browser-check",
    "--remote-debugging-port=0",
    "--window-size=1280,900",
)
_OF_BOKEH = "could not set initial ranges"  # what it says of a plot that has no data yet
# All text of a page, that in the shadow trees of bokeh's models included.
_TEXT = """
(() => {
  const read = node => node.nodeType === 3 ? node.data
    : ["STYLE", "SCRIPT"].includes(node.nodeName) ? ""
    : [...(node.shadowRoot ? node.shadowRoot.childNodes : []), ...node.childNodes].map(read).join(" ");
  return document.body ? read(document.body) : "";
})()
"""


class Tab:
    """One page of a browser, and what it complained of."""

    def __init__(self, address: str) -> None:
        self.complaints: list[str] = []
        self._loop = asyncio.new_event_loop()
        self._n_asked = 0
        self._socket: WebSocketClientConnection = self._run(_connected(address))
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **arguments: Any) -> dict[str, Any]:
        """What the browser answers to one command."""
        return self._run(self._ask(method, arguments))

    def open(self, url: str) -> None:
        """Go to an address."""
        answer = self.ask("Page.navigate", url=url)
        assert "errorText" not in answer, answer

    def evaluate(self, script: str) -> Any:
        """The value of an expression in the page."""
        answer = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    @property
    def text(self) -> str:
        """All that can be read on the page."""
        return " ".join(str(self.evaluate(_TEXT)).split())

    def wait_for(self, look: Callable[[], Any], seconds: float = 30.0) -> Any:
        """What is seen in the page as soon as it is something."""
        deadline = time.monotonic() + seconds
        while not (seen := look()):
            assert time.monotonic() < deadline, f"not within {seconds} s; complaints {self.complaints}; page: {self.text}"
            self._run(asyncio.sleep(0.05))
        return seen

    def save_picture(self, path: Path) -> None:
        """Write what is seen as a PNG."""
        path.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        """End the connection."""
        self._run(self._hang_up())
        self._loop.close()

    async def _hang_up(self) -> None:
        self._socket.close()
        await asyncio.sleep(0)

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self._loop.run_until_complete(work)

    async def _ask(self, method: str, arguments: dict[str, Any]) -> dict[str, Any]:
        self._n_asked += 1
        await self._socket.write_message(json.dumps({"id": self._n_asked, "method": method, "params": arguments}))
        while True:
            told = await asyncio.wait_for(self._socket.read_message(), START_SECONDS)
            assert told is not None, "the browser is gone"
            message = json.loads(told)
            if message.get("id") == self._n_asked:
                assert "error" not in message, message
                return dict(message["result"])
            self._hear(message["method"], message["params"])

    def _hear(self, event: str, told: dict[str, Any]) -> None:
        if event == "Runtime.exceptionThrown":
            self.complaints.append(str(told["exceptionDetails"]))
        elif event == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            if any(_OF_BOKEH in str(argument.get("value")) for argument in told["args"]):
                return
            self.complaints.append(str(told["args"]))
        elif event == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.complaints.append(str(told["entry"]))
        elif event == "Network.responseReceived" and told["response"]["status"] >= 400:
            self.complaints.append(f"{told['response']['status']} {told['response']['url']}")


async def _connected(address: str) -> WebSocketClientConnection:
    return await websocket_connect(HTTPRequest(address), max_message_size=1 << 28)


@contextlib.contextmanager
def opened(url: str) -> Iterator[Tab]:
    """A tab of a browser of its own that shows ``url``."""
    assert PROGRAM is not None, "look at PROGRAM before"
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        command = [PROGRAM, *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
        browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            tab = Tab(_address(Path(profile, "DevToolsActivePort"), browser))
            try:
                tab.open(url)
                yield tab
            finally:
                with contextlib.suppress(Exception):  # it may be gone
                    tab.ask("Browser.close")
                tab.close()
                browser.wait(START_SECONDS)
        finally:
            browser.kill()
            browser.wait()


def _address(note: Path, browser: subprocess.Popen[bytes]) -> str:
    """Where the browser's one tab is talked to, once the browser has noted its port."""
    import urllib.request

    deadline = time.monotonic() + START_SECONDS
    while True:
        assert browser.poll() is None and time.monotonic() < deadline, "the browser does not start"
        with contextlib.suppress(OSError, IndexError, StopIteration):
            port = note.read_text().split()[0]
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=START_SECONDS) as answer:
                return str(next(tab["webSocketDebuggerUrl"] for tab in json.load(answer) if tab["type"] == "page"))
        time.sleep(0.05)
