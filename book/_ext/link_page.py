"""Sphinx extension: all addresses outside the book in one list, and names for the fold marks.

The line ``<!-- links -->`` of a page is replaced by a table of every external address in the book's
pages, chapters and bibliography, with the places that use it. The weekly job *links* visits them
(``--builder linkcheck``); a dead one is news and fails nothing.

The theme's side bar folds sub-pages with a mark that has no name for a screen reader; it gets one
when the pages are written. The bibliography is called a list there although its entries are none of
a list's; that role is taken off.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat

if TYPE_CHECKING:
    from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[2]
MARK = "<!-- links -->"
ADDRESS = re.compile(r"https?://[^\s<>\"'`{}|\\^\[\])]+[^\s<>\"'`{}|\\^\[\]).,;:]")
BIB_FIELD = re.compile(r"^\s*(doi|url|eprint)\s*=\s*\{([^}]+)\}", re.M)
PREFIX = {"doi": "https://doi.org/", "url": "", "eprint": "https://arxiv.org/abs/"}
NAMELESS = '<summary><span class="toctree-toggle"'
CALLED_LIST = '<div role="list" class="citation-list">'
CALLED_LIST_BY_CLASS = '<div class="citation-list">'
NAMED = '<summary aria-label="Fold the pages below"><span class="toctree-toggle"'


def sources() -> list[tuple[str, str]]:
    """Name and text of everything a reader sees: pages, chapters' prose."""
    found = [(f.name, f.read_text(encoding="utf-8")) for f in sorted((ROOT / "book").glob("*.md"))]
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
        found.append((path.name, prose))
    return found


def links() -> dict[str, list[str]]:
    """External addresses in alphabetical order, each with the files that use it."""
    found: dict[str, list[str]] = {}
    for name, text in sources():
        for address in sorted(set(ADDRESS.findall(text))):
            found.setdefault(address, []).append(name)
    bibliography = (ROOT / "book" / "references.bib").read_text(encoding="utf-8")
    for field, value in BIB_FIELD.findall(bibliography):
        used_by = found.setdefault(PREFIX[field] + value, [])
        if "references.bib" not in used_by:
            used_by.append("references.bib")
    return dict(sorted(found.items()))


def table() -> str:
    """The list in Markdown."""
    rows = [f"| <{address}> | {', '.join(names)} |" for address, names in links().items()]
    return "\n".join(["| address | used by |", "|---|---|", *rows])


def fill_mark(app: Sphinx, docname: str, source: list[str]) -> None:
    """Replace the mark while Sphinx reads the page."""
    if MARK in source[0]:
        source[0] = source[0].replace(MARK, table())


def for_screen_readers(app: Sphinx, exception: Exception | None) -> None:
    """Give the fold marks of the written pages a name, and the bibliography no wrong role."""
    if exception is None and app.builder.format == "html":
        for page in Path(app.outdir).rglob("*.html"):
            text = page.read_text(encoding="utf-8")
            better = text.replace(NAMELESS, NAMED).replace(CALLED_LIST, CALLED_LIST_BY_CLASS)
            if better != text:
                page.write_text(better, encoding="utf-8")


def setup(app: Sphinx) -> dict[str, Any]:
    """Register both."""
    app.connect("source-read", fill_mark)
    app.connect("build-finished", for_screen_readers)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
