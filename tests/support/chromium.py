"""A headless Chromium that runs JavaScript in one page, through its own debugging protocol."""

from __future__ import annotations

import base64
import functools
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import websocket

from raylight.dev.demo.comfy_process import ComfyProcess

VARIABLE = "RAYLIGHT_TEST_BROWSER"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
_START = 300.0
_POLL = 0.1


def find() -> str | None:
    """A Chromium of this machine: the one that RAYLIGHT_TEST_BROWSER names, or the first in the path that runs.

    Some systems have a script of its name that only says how to get it.
    """
    named = os.environ.get(VARIABLE)
    return named or next((found for name in NAMES if (found := shutil.which(name)) and _runs(found)), None)


@functools.cache
def _runs(program: str) -> bool:
    return subprocess.run([program, "--version"], capture_output=True, stdin=subprocess.DEVNULL).returncode == 0


class BrowserError(RuntimeError):
    """The browser did not start, or a script in its page raised."""


class Page:
    """One page of a browser of its own; use it as a context manager.

    `websocket-client`, which the tests have anyway, is enough to drive it: what is needed is to open an address and
    to await one expression.
    """

    def __init__(self, browser: str) -> None:
        self._profile = Path(tempfile.mkdtemp(prefix="browser-"))
        self._log = self._profile / "browser.log"
        # Chromium does not start its sandbox for root, in whose name containers run tests. It is shown one address of
        # the loopback interface only. And a container's /dev/shm is often too small for a page.
        command = [
            browser,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-extensions",
            "--disable-background-networking",
            "--disable-sync",
            "--disable-component-update",
            "--disable-quic",
            "--mute-audio",
            f"--user-data-dir={self._profile}",
            "--remote-debugging-port=0",
            "--remote-allow-origins=*",
            "--no-proxy-server",
            "--window-size=1600,1000",
            "about:blank",
        ]
        self._process = ComfyProcess(command, cwd=self._profile, environ=dict(os.environ), log=self._log)
        self._socket: websocket.WebSocket | None = None
        self._session: str | None = None
        self._number = 0
        try:
            self._connect()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Page:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the browser and remove its profile."""
        if self._socket is not None:
            self._session = None
            try:
                self.call("Browser.close", {}, timeout=5)  # many times faster than by signals
            except (BrowserError, OSError, websocket.WebSocketException):
                pass  # it may be gone before it has answered
            self._socket.close()
        self._process.stop()
        shutil.rmtree(self._profile, ignore_errors=True)

    def open(self, address: str) -> None:
        self.call("Page.navigate", {"url": address})

    def evaluate(self, expression: str, timeout: float = 300.0) -> Any:
        """The value, made JSON, of a JavaScript expression; a promise is awaited."""
        answer = self.call(
            "Runtime.evaluate", {"expression": expression, "awaitPromise": True, "returnByValue": True}, timeout
        )
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise BrowserError(str(details.get("exception", {}).get("description") or details.get("text")))
        return answer["result"].get("value")

    def screenshot(self) -> bytes:
        """What it shows, as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", {"format": "png"})["data"])

    def wait_for(self, expression: str, timeout: float = 300.0) -> None:
        """Wait until an expression is true."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                if self.evaluate(expression):
                    return
            except BrowserError as error:
                problem: str | None = str(error)
            else:
                problem = None
            if time.monotonic() > deadline:
                raise BrowserError(f"the page has not come to {expression!r} in {timeout} s ({problem})")
            time.sleep(_POLL)

    def call(self, method: str, params: dict[str, Any], timeout: float = 300.0) -> dict[str, Any]:
        """One command of the debugging protocol. Raises BrowserError when it fails or is not answered in time."""
        assert self._socket is not None
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        self._socket.send(json.dumps(message))
        deadline = time.monotonic() + timeout
        while True:
            self._socket.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                answer = json.loads(self._socket.recv())
            except websocket.WebSocketTimeoutException as error:
                raise BrowserError(f"the browser has not answered {method} in {timeout} s") from error
            if answer.get("id") == self._number:  # everything else is events
                if "error" in answer:
                    raise BrowserError(f"{method}: {answer['error'].get('message')}")
                return answer["result"]

    def _connect(self) -> None:
        port_file = self._profile / "DevToolsActivePort"
        deadline = time.monotonic() + _START
        while not port_file.exists() or len(port_file.read_text().splitlines()) < 2:
            if self._process.exit_code() is not None or time.monotonic() > deadline:
                raise BrowserError(f"the browser did not start:\n{self._log.read_text(errors='replace')[-2000:]}")
            time.sleep(_POLL)
        port, path = port_file.read_text().splitlines()[:2]
        self._socket = websocket.create_connection(
            f"ws://127.0.0.1:{port}{path}", timeout=_START, http_no_proxy=["127.0.0.1"]
        )
        self._session = None
        target = self.call("Target.createTarget", {"url": "about:blank"}, _START)["targetId"]
        answer = self.call("Target.attachToTarget", {"targetId": target, "flatten": True}, _START)
        self._session = answer["sessionId"]
