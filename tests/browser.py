"""A browser without a window and, where the system can, without a network."""

from __future__ import annotations

import html
import json
import re
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
WAIT_MS = 15_000  # virtual milliseconds that a page's scripts are given
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


def ask(probe: str, *, script: Path, body: str, timeout: float = 600.0) -> Any:
    """What a probe returns in a page with one script of the book.

    Skips the test where there is no browser.

    Args:
        probe: the body of a JavaScript function, called once the page stands.
        script: the book's script.
        body: HTML that the script finds.
        timeout: seconds.
    """
    text = (
        f"<!doctype html><meta charset=utf-8>{body}<pre id=out></pre>"
        f"<script>{script.read_text(encoding='utf-8')}</script>"
        "<script>document.addEventListener('DOMContentLoaded', () => {"
        "const asked = () => {" + probe + "};"
        "document.getElementById('out').textContent = JSON.stringify(asked());});</script>"
    )
    with tempfile.TemporaryDirectory() as profile:
        page = Path(profile) / "page.html"
        page.write_text(text, encoding="utf-8")
        done = subprocess.run(
            [
                *(*_cut(), _browser(), *OPTIONS),
                f"--user-data-dir={profile}",
                f"--virtual-time-budget={WAIT_MS}",
                "--dump-dom",
                page.as_uri(),
            ],
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )
    assert done.returncode == 0, done.stderr[-2000:]
    out = re.search(r'<pre id="out">(.+?)</pre>', done.stdout, re.S)
    assert out, "the script did not finish"
    return json.loads(html.unescape(out[1]))


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

    def paper(self) -> None:
        """Lay pages out from now on as on A4 with margins of 10 mm, at 96 pixels to the inch."""
        self._call("Emulation.setEmulatedMedia", media="print")
        size = {"width": 718, "height": 1047, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", **size)


@contextmanager
def open_tab(timeout: float = 900.0) -> Iterator[Tab]:
    """A browser with one tab, to be told what to do; its pages should be files.

    Skips the test where there is no browser or no client for its socket.

    Args:
        timeout: seconds that one answer may take; the largest pages keep a busy core for minutes.
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
