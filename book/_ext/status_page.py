"""Sphinx extension: which chapter ran when, where and for how long, from ``book/status.json``.

The line ``<!-- status -->`` of a page is replaced by a table with one row per chapter of the table
of contents. `book/execute.py` keeps the file; a chapter that it has not run yet has a blank row.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "book"))

from execute import STATUS, fingerprint  # noqa: E402  # a script, not a package

if TYPE_CHECKING:
    from sphinx.application import Sphinx

MARK = "<!-- status -->"


def chapters() -> list[Path]:
    """Notebooks of the table of contents, in its order."""
    toc = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text(encoding="utf-8"))
    files = [entry["file"] for part in toc["parts"] for entry in part["chapters"]]
    return [ROOT / f"{file}.ipynb" for file in files if file.startswith("notebooks/")]


def table(status: dict[str, Any], notebooks: list[Path]) -> str:
    """The table in Markdown."""
    rows = ["| chapter | run (UTC) | seconds | machine | Python | torch | code since |"]
    rows.append("|---|---|---|---|---|---|---|")
    for path in notebooks:
        cells = [f"{{doc}}`../notebooks/{path.stem}`"]
        run = status.get(path.stem)
        if run is None:
            cells += [""] * 6
        else:
            same = run["code"] == fingerprint(nbformat.read(path, as_version=4))
            cells += [run["date"], f"{run['seconds']:.1f}", run["machine"], run["python"]]
            cells += [run["torch"], "unchanged" if same else "changed: run it again"]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def fill_mark(app: Sphinx, docname: str, source: list[str]) -> None:
    """Replace the mark while Sphinx reads the page."""
    if MARK in source[0]:
        status = json.loads(STATUS.read_text(encoding="utf-8")) if STATUS.is_file() else {}
        source[0] = source[0].replace(MARK, table(status, chapters()))


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the replacement."""
    app.connect("source-read", fill_mark)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
