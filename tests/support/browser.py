"""A headless Chromium, controlled by the DevTools protocol over a websocket of tornado, which Dask depends on."""

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
# No sandbox: CI runs as root in a container, which provides none, and the pages are local. No background traffic.
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
_BOKEH_WARNING = "could not set initial ranges"  # bokeh logs it for a plot without data
# Reads all text of a page, including that in the shadow trees of bokeh's models.
_READ_TEXT_JS = """
(() => {
  const read = node => node.nodeType === 3 ? node.data
    : ["STYLE", "SCRIPT"].includes(node.nodeName) ? ""
    : [...(node.shadowRoot ? node.shadowRoot.childNodes : []), ...node.childNodes].map(read).join(" ");
  return document.body ? read(document.body) : "";
})()
"""


class Tab:
    """One page of a browser, and the errors that it logged."""

    def __init__(self, address: str) -> None:
        self.errors: list[str] = []
        self._loop = asyncio.new_event_loop()
        self._n_commands = 0
        self._socket: WebSocketClientConnection = self._run(_connect(address))
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **arguments: Any) -> dict[str, Any]:
        """Send one command and return the browser's reply."""
        return self._run(self._ask(method, arguments))

    def open(self, url: str) -> None:
        """Navigate to an address."""
        reply = self.ask("Page.navigate", url=url)
        assert "errorText" not in reply, reply

    def evaluate(self, script: str) -> Any:
        """Evaluate an expression in the page."""
        reply = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    @property
    def text(self) -> str:
        """All text of the page."""
        return " ".join(str(self.evaluate(_READ_TEXT_JS)).split())

    def wait_for(self, condition: Callable[[], Any], seconds: float = 30.0) -> Any:
        """Poll ``condition()`` until it is true; return its value."""
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < deadline, f"not within {seconds} s; errors {self.errors}; page: {self.text}"
            self._run(asyncio.sleep(0.05))
        return value

    def save_picture(self, path: Path) -> None:
        """Save a screenshot as a PNG."""
        path.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        """Close the connection."""
        self._run(self._disconnect())
        self._loop.close()

    async def _disconnect(self) -> None:
        self._socket.close()
        await asyncio.sleep(0)

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self._loop.run_until_complete(work)

    async def _ask(self, method: str, arguments: dict[str, Any]) -> dict[str, Any]:
        self._n_commands += 1
        await self._socket.write_message(json.dumps({"id": self._n_commands, "method": method, "params": arguments}))
        while True:
            text = await asyncio.wait_for(self._socket.read_message(), START_SECONDS)
            assert text is not None, "the browser has exited"
            message = json.loads(text)
            if message.get("id") == self._n_commands:
                assert "error" not in message, message
                return dict(message["result"])
            self._record_error(message["method"], message["params"])

    def _record_error(self, event: str, details: dict[str, Any]) -> None:
        if event == "Runtime.exceptionThrown":
            self.errors.append(str(details["exceptionDetails"]))
        elif event == "Runtime.consoleAPICalled" and details["type"] in ("error", "warning", "assert"):
            if any(_BOKEH_WARNING in str(argument.get("value")) for argument in details["args"]):
                return
            self.errors.append(str(details["args"]))
        elif event == "Log.entryAdded" and details["entry"]["level"] in ("error", "warning"):
            self.errors.append(str(details["entry"]))
        elif event == "Network.responseReceived" and details["response"]["status"] >= 400:
            self.errors.append(f"{details['response']['status']} {details['response']['url']}")


async def _connect(address: str) -> WebSocketClientConnection:
    return await websocket_connect(HTTPRequest(address), max_message_size=1 << 28)


@contextlib.contextmanager
def open_tab(url: str) -> Iterator[Tab]:
    """Start a browser and open ``url`` in its tab."""
    assert PROGRAM is not None, "check PROGRAM first"
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        command = [PROGRAM, *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
        browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            tab = Tab(_find_address(Path(profile, "DevToolsActivePort"), browser))
            try:
                tab.open(url)
                yield tab
            finally:
                with contextlib.suppress(Exception):  # it may have exited
                    tab.ask("Browser.close")
                tab.close()
                browser.wait(START_SECONDS)
        finally:
            browser.kill()
            browser.wait()


def _find_address(port_file: Path, browser: subprocess.Popen[bytes]) -> str:
    """Wait until the browser has written its port; return the websocket address of its tab."""
    import urllib.request

    deadline = time.monotonic() + START_SECONDS
    while True:
        assert browser.poll() is None and time.monotonic() < deadline, "the browser did not start"
        with contextlib.suppress(OSError, IndexError, StopIteration):
            port = port_file.read_text().split()[0]
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=START_SECONDS) as reply:
                return str(next(tab["webSocketDebuggerUrl"] for tab in json.load(reply) if tab["type"] == "page"))
        time.sleep(0.05)
