"""A browser without a window and, where the system can, without a network."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@cache
def _command() -> list[str] | None:
    """Command line up to the options of one page; None without a browser."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        return None
    cut = ["unshare", "--net"]  # needs rights that not every account has
    able = shutil.which("unshare") and subprocess.run([*cut, "true"], check=False).returncode == 0
    return [
        *(cut if able else []),
        found,
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *("--disable-dev-shm-usage", "--allow-file-access-from-files"),
    ]


def dump_dom(page: Path, *, wait_ms: int = 15_000, timeout: float = 150.0) -> str:
    """What a page's document holds after its scripts ran.

    Skips the test where there is no browser.

    Args:
        page: an HTML file.
        wait_ms: virtual milliseconds that the scripts are given.
        timeout: real seconds.
    """
    command = _command()
    if command is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on the path")
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run(
            [
                *command,
                f"--user-data-dir={profile}",
                f"--virtual-time-budget={wait_ms}",
                "--window-size=1200,2600",
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
