"""A browser without a window and, where the system can, without a network."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--window-size=1200,2600"),
)


def _browser() -> str:
    """Path of a browser; skips the test where there is none."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on the path")
    return found


@cache
def _cut() -> list[str]:
    """What cuts a command off the network; nothing where this account may not."""
    cut = ["unshare", "--net"]
    able = shutil.which("unshare") and subprocess.run([*cut, "true"], check=False).returncode == 0
    return cut if able else []


def dump_dom(page: Path, *, wait_ms: int = 15_000, timeout: float = 600.0) -> str:
    """What a page's document holds after its scripts ran.

    Skips the test where there is no browser.

    Args:
        page: an HTML file.
        wait_ms: virtual milliseconds that the scripts are given.
        timeout: real seconds.
    """
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run(
            [
                *(*_cut(), _browser(), *OPTIONS),
                f"--user-data-dir={profile}",
                f"--virtual-time-budget={wait_ms}",
                "--dump-dom",
                page.resolve().as_uri(),
            ],
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


class Tab:
    """One tab of a running browser."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self._number = 0

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        self._socket.send(json.dumps(message))
        while True:  # events come in between
            answer = json.loads(self._socket.recv())
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def evaluate(self, expression: str) -> Any:
        """Value of an expression of JavaScript; a promise is waited for."""
        asked = {"expression": expression, "awaitPromise": True, "returnByValue": True}
        answer = self._call("Runtime.evaluate", **asked)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def go(self, page: Path) -> None:
        """Open a file and wait until it is loaded."""
        self._call("Page.navigate", url=page.resolve().as_uri())
        self.evaluate(
            "new Promise((done) => { const look = () => document.readyState === 'complete' ? done()"
            " : setTimeout(look, 50); look(); })"
        )


@contextmanager
def open_tab(timeout: float = 180.0) -> Iterator[Tab]:
    """A browser with one tab, to be told what to do; its pages should be files.

    Skips the test where there is no browser or no client for its socket.

    Args:
        timeout: seconds that one answer may take.
    """
    websocket = pytest.importorskip("websocket", reason="websocket-client, of JupyterLab")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = [*OPTIONS, "--remote-debugging-port=0", f"--user-data-dir={profile}"]
        browser = subprocess.Popen(
            [_browser(), *options, "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            told = Path(profile) / "DevToolsActivePort"
            give_up = time.monotonic() + timeout
            while not (told.is_file() and len(told.read_text().splitlines()) > 1):
                assert time.monotonic() < give_up, "the browser did not start"
                time.sleep(0.1)
            port = told.read_text().splitlines()[0]
            with urlopen(f"http://127.0.0.1:{port}/json", timeout=timeout) as answer:
                tabs = [tab for tab in json.load(answer) if tab["type"] == "page"]
            socket = websocket.create_connection(
                tabs[0]["webSocketDebuggerUrl"], timeout=timeout, suppress_origin=True
            )
            try:
                yield Tab(socket)
            finally:
                socket.close()
        finally:
            browser.terminate()
            browser.wait(timeout=60)
