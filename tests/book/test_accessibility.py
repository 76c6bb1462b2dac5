"""No serious finding of axe-core on any built page, in light and in dark.

axe-core is fetched by npm when the test runs and is never kept. It looks at every page for seconds,
so it runs when asked for:

    MTL_TUTORIAL_AXE=1 python -m pytest tests/book/test_accessibility.py

Skipped where the book is not built, or where there is no browser, no npm or no network.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from browser import open_tab

HTML = Path(__file__).resolve().parents[2] / "_build" / "html"
AXE = "axe-core@4.10.3"
SERIOUS = ("serious", "critical")

pytestmark = [
    pytest.mark.skipif(
        not (HTML / "index.html").is_file(), reason="the book is not built; run `make book`"
    ),
    pytest.mark.skipif(
        not os.environ.get("MTL_TUTORIAL_AXE"), reason="takes minutes; set MTL_TUTORIAL_AXE=1"
    ),
]

# Looks at the page that is open, in light and then in dark; gives the findings.
LOOK = """
(async () => {
  if (window.MathJax && MathJax.startup) await MathJax.startup.promise;
  const findings = [];
  for (const theme of ["light", "dark"]) {
    document.documentElement.dataset.theme = theme;
    document.documentElement.dataset.mode = theme;
    await new Promise((resolve) => setTimeout(resolve, 400));  // colours fade
    const options = { resultTypes: ["violations"] };
    if (theme === "dark") options.runOnly = ["color-contrast"];
    const { violations } = await axe.run(document, options);
    violations.forEach(({ id, impact, help, nodes }) => findings.push({
      theme, id, impact, help, count: nodes.length,
      first: nodes[0].html.slice(0, 160), why: (nodes[0].failureSummary || "").slice(0, 300),
    }));
  }
  return findings;
})()
"""


@pytest.fixture(scope="module")
def axe(tmp_path_factory):
    """Source of axe-core."""
    if shutil.which("npm") is None:
        pytest.skip("no npm to fetch axe-core with")
    folder = tmp_path_factory.mktemp("axe")
    done = subprocess.run(
        ["npm", "pack", "--silent", AXE], cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"npm cannot fetch {AXE}: {done.stderr.strip()[-200:]}")
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        return archive.extractfile("package/axe.min.js").read().decode()


def look(axe: str, pages: list[Path]) -> list[dict]:
    """Findings of axe-core on pages, in their order."""
    found = []
    with open_tab() as tab:
        for page in pages:
            tab.go(page)
            tab.evaluate(f"{axe};0")
            found += [{"page": page.name} | finding for finding in tab.evaluate(LOOK)]
    return found


def listed() -> list[Path]:
    """All pages but listings of source code, of which one stands for all."""
    found = [page for page in sorted(HTML.rglob("*.html")) if page != HTML / "index.html"]
    code = [page for page in found if "_modules" in page.relative_to(HTML).parts]
    return [page for page in found if page not in code and "_static" not in page.parts] + code[-1:]


def test_no_page_has_a_serious_finding(axe):
    found = [f for f in look(axe, listed()) if f["impact"] in SERIOUS]
    assert not found, json.dumps(found, indent=1)


def test_a_fault_is_found(axe, tmp_path):
    body = '<main><h1>x</h1><img src="x.png"><p style="color:#eee">pale</p></main>'
    text = f"<!doctype html><html lang=en><head><title>x</title></head><body>{body}</body></html>"
    page = tmp_path / "page.html"
    page.write_text(text, encoding="utf-8")
    assert {"image-alt", "color-contrast"} <= {f["id"] for f in look(axe, [page])}
