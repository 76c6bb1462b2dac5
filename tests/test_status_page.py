"""The page that says when chapters ran, and the script that sorts tables."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import nbformat
import pytest
from browser import ask

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "book"


@pytest.fixture(scope="module")
def page():
    pytest.importorskip("sphinx", reason="the extension belongs to the book's tools")
    pytest.importorskip("nbclient", reason="executing a chapter needs nbclient")
    sys.path[:0] = [str(BOOK), str(BOOK / "_ext")]
    try:
        yield importlib.import_module("status_page")
    finally:
        sys.path.remove(str(BOOK))
        sys.path.remove(str(BOOK / "_ext"))


def notebook(path, *code):
    cells = [nbformat.v4.new_code_cell(source) for source in code]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def test_run_is_recorded_beside_those_of_other_chapters(page, tmp_path):
    execute = sys.modules["execute"]
    status = tmp_path / "status.json"
    status.write_text(json.dumps({"01_other": {"seconds": 1.0}}), encoding="utf-8")
    execute.record(notebook(tmp_path / "02_x.ipynb", "1 + 1"), 3.14, status)
    found = json.loads(status.read_text(encoding="utf-8"))
    assert found["01_other"] == {"seconds": 1.0}
    assert found["02_x"]["seconds"] == 3.1
    assert re.fullmatch(r"20\d\d-\d\d-\d\d \d\d:\d\d", found["02_x"]["date"])
    assert all(found["02_x"][key] for key in ("machine", "python", "torch", "code"))


def test_table_says_when_and_whether_the_code_changed_since(page, tmp_path):
    execute = sys.modules["execute"]
    path, never = (notebook(tmp_path / f"{name}.ipynb", "1 + 1") for name in ("02_x", "03_y"))
    status = tmp_path / "status.json"
    execute.record(path, 3.14, status)
    rows = page.table(json.loads(status.read_text(encoding="utf-8")), [path, never]).splitlines()
    assert rows[2].startswith("| {doc}`../notebooks/02_x` | 20")
    assert rows[2].endswith("| unchanged |")
    assert rows[3] == "| {doc}`../notebooks/03_y` |" + "  |" * 6
    notebook(path, "1 + 2")
    assert "| changed: run it again |" in page.table(json.loads(status.read_text()), [path])


def test_every_chapter_has_a_row(page):
    source = [(BOOK / "status.md").read_text(encoding="utf-8")]
    page.fill_mark(None, "book/status", source)
    rows = re.findall(r"^\| \{doc\}`\.\./notebooks/(\w+)` \|", source[0], re.M)
    assert rows == [path.stem for path in page.chapters()]
    assert len(rows) >= 4


def test_recorded_chapters_exist(page):
    status = sys.modules["execute"].STATUS
    if status.is_file():
        known = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
        gone = set(json.loads(status.read_text(encoding="utf-8"))) - known
        assert not gone, f"remove from book/status.json: {sorted(gone)}"


SORTED = """
const box = document.querySelector("table");
const column = (i) => [...box.tBodies[0].rows].map((row) => row.cells[i].textContent);
const press = (i) => box.tHead.rows[0].cells[i].querySelector("button").click();
const found = [column(0)];
for (const i of [1, 1, 0, 2]) { press(i); found.push(column(0)); }
found.push([...box.tHead.rows[0].cells].map((cell) => cell.getAttribute("aria-sort")));
found.push(document.querySelectorAll("button").length);
return found;
"""


def test_tables_of_figures_sort_in_a_browser():
    rows = [("b", "9.5 ± 1.0", "word"), ("c", "", "1,200"), ("a", "−3.00 ± 0.1", "30")]
    rows.append(("d", "10.25", "4"))
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    words = "<table><thead><tr><th>x</th></tr></thead><tbody>" + "<tr><td>w</td></tr>" * 5
    tables = (
        "<div class=bd-article><table><thead><tr><th>name</th><th>score</th><th>other</th></tr>"
        f"</thead><tbody>{body}</tbody></table>{words}</tbody></table></div>"
    )
    found = ask(SORTED, script=BOOK / "_static" / "sort.js", body=tables)
    start, up, down, by_name, mixed, directions, buttons = found
    assert start == ["b", "c", "a", "d"]
    assert up == ["a", "b", "d", "c"]  # the blank cell last
    assert down == ["d", "b", "a", "c"]
    assert by_name == ["a", "b", "c", "d"]
    assert mixed == ["d", "a", "c", "b"]  # numbers before words
    assert directions == [None, None, "ascending"]
    assert buttons == 3  # none in the table without figures
