"""Printed pages: nothing cut off at the margin, no bars, no buttons.

Runs after `make book`; skipped where the book is not built or there is no browser.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import open_tab

HTML = Path(__file__).resolve().parents[2] / "_build" / "html"
PAGES = ("notebooks/35_aligned_mtl", "book/results", "book/rules", "book/methods/imtl")

pytestmark = pytest.mark.skipif(
    not (HTML / "index.html").is_file(), reason="the book is not built; run `make book`"
)

# What is wider than the box that would have to scroll, or than the paper; and what paper has no
# use for.
LOOK = """
(async () => {
  if (window.MathJax && MathJax.startup) await MathJax.startup.promise;
  const name = (e) => `${e.tagName} ${e.className}: ${e.textContent.trim().slice(0, 60)}`;
  const all = (query) => [...document.querySelectorAll(query)];
  const cut = all(".bd-article pre, .bd-article table, .bd-article img, .mtl-scroll").filter(
    (e) => e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).overflowX !== "visible"
      || e.getBoundingClientRect().right > document.documentElement.clientWidth + 1);
  const bars = all(".bd-header-article, .bd-sidebar-primary, .bd-sidebar-secondary, .copybtn,"
    + ".prev-next-footer, .toggle-button, .headerlink, .mtl-tasks");
  const shown = bars.filter((e) => e.checkVisibility());
  return {cut: cut.map(name), shown: shown.map(name), tables: all(".bd-article table").length};
})()
"""


def test_paper_shows_everything_and_no_bars():
    found = {}
    with open_tab() as tab:
        tab.paper()
        for page in PAGES:
            tab.go(HTML / f"{page}.html")
            found[page] = tab.evaluate(LOOK)
    assert found["book/results"]["tables"] > 10
    assert {page: look["cut"] for page, look in found.items() if look["cut"]} == {}
    assert {page: look["shown"] for page, look in found.items() if look["shown"]} == {}
