"""What every chapter must look like on disk. Nothing is executed here; nbval does that."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted((ROOT / "notebooks").glob("*.ipynb"))

METHOD_HEADINGS = [
    "The problem",
    "Derivation",
    "Algorithm",
    "From scratch",
    "Toy problem",
    "The package, checked",
    "Benchmark",
    "When it fails",
    "Exercises",
    "References and versions",
]
METHOD_NUMBERS = range(20, 50)  # Parts II to IV; the other parts are free in their sections
MAX_CODE_LINES = 25
MAX_BYTES = 1_000_000
ACTIVE_MIME = re.compile(r"widget|javascript|bokeh|plotly|vega", re.IGNORECASE)
ABSOLUTE_PATH = re.compile(
    r"(?<![\w.:/-])/(?:home|root|Users|work|tmp|mnt|opt|usr|var|content|workspace)/"
    r"|[A-Za-z]:\\\\?Users\b|~/"
)
CITATION = re.compile(r"\{cite(?::[a-z]+)?\}`([^`]+)`")
CHECKED = re.compile(r"^\s*#\s*NBVAL_CHECK_OUTPUT\s*$", re.MULTILINE)

Notebook = dict[str, Any]


def text(source: str | list[str]) -> str:
    """A multi-line string of the notebook format, which may be stored as a list of lines."""
    return source if isinstance(source, str) else "".join(source)


def code_cells(notebook: Notebook) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def tags(cell: dict[str, Any]) -> list[str]:
    return cell["metadata"].get("tags", [])


def markdown(notebook: Notebook) -> str:
    cells = notebook["cells"]
    return "\n\n".join(text(c["source"]) for c in cells if c["cell_type"] == "markdown")


def headings(notebook: Notebook, level: int) -> list[str]:
    """Headings of one level in order, without those inside fences."""
    prose = re.sub(r"^(`{3,}|:{3,}).*?^\1\s*$", "", markdown(notebook), flags=re.S | re.M)
    return re.findall(rf"^#{{{level}}} +(.+?) *$", prose, flags=re.MULTILINE)


def toc_files() -> list[str]:
    toc = yaml.safe_load((ROOT / "book/_toc.yml").read_text(encoding="utf-8"))
    parts = toc.get("parts", [{"chapters": toc.get("chapters", [])}])
    return [toc["root"], *(chapter["file"] for part in parts for chapter in part["chapters"])]


def bibliography_keys() -> set[str]:
    source = (ROOT / "book/references.bib").read_text(encoding="utf-8")
    return set(re.findall(r"^@\w+\{([^,\s]+),", source, flags=re.MULTILINE))


# --- the checks: each takes the raw notebook and returns what is wrong with it -------------------


def wrong_format(notebook: Notebook) -> list[str]:
    # Ids first: the validator would invent missing ones instead of refusing them.
    ids = [cell.get("id") for cell in notebook["cells"]]
    if None in ids or len(set(ids)) != len(ids):
        return ["expected a different id in every cell"]
    try:
        nbformat.validate(nbformat.from_dict(notebook))
    except nbformat.ValidationError as error:
        return [str(error).splitlines()[0]]
    kernel = notebook["metadata"].get("kernelspec", {}).get("name")
    return [] if kernel == "python3" else [f"expected kernel python3, got {kernel}"]


def not_run_in_order(notebook: Notebook) -> list[str]:
    counts = [c["execution_count"] for c in code_cells(notebook) if text(c["source"]).strip()]
    if counts == list(range(1, len(counts) + 1)):
        return []
    return [f"expected execution counts 1 to {len(counts)} in order, got {counts}; execute again"]


def bad_outputs(notebook: Notebook) -> list[str]:
    found = []
    for number, cell in enumerate(code_cells(notebook), start=1):
        for output in cell["outputs"]:
            if output.get("name") == "stderr":
                found.append(f"code cell {number} wrote to stderr")
            if output["output_type"] == "error" and "raises-exception" not in tags(cell):
                found.append(f"code cell {number} raised {output['ename']} without the tag")
            found += [
                f"code cell {number} needs a script to show {mime}"
                for mime, content in output.get("data", {}).items()
                if ACTIVE_MIME.search(mime) or "<script" in str(content)
            ]
    return found


def names_this_machine(notebook: Notebook) -> list[str]:
    strings = [text(cell["source"]) for cell in notebook["cells"]]
    for cell in code_cells(notebook):
        for output in cell["outputs"]:
            strings.append(text(output.get("text", "")))
            strings += [
                str(content)
                for mime, content in output.get("data", {}).items()
                if not mime.startswith("image/")
            ]
            strings += output.get("traceback", [])
    return [f"absolute path {hit!r}" for s in strings for hit in ABSOLUTE_PATH.findall(s)]


def has_timing(notebook: Notebook) -> list[str]:
    return [
        f"cell {number} carries timing metadata; use book/execute.py"
        for number, cell in enumerate(notebook["cells"], start=1)
        if {"execution", "ExecuteTime"} & set(cell["metadata"])
    ]


def nothing_checked(notebook: Notebook) -> list[str]:
    for cell in code_cells(notebook):
        marked = "nbval-check-output" in tags(cell) or CHECKED.search(text(cell["source"]))
        if marked and cell["outputs"]:
            return []
    return ["expected a cell tagged nbval-check-output that has an output, got none"]


def undescribed_images(notebook: Notebook) -> list[str]:
    found = []
    for number, cell in enumerate(code_cells(notebook), start=1):
        mimes = {mime for output in cell["outputs"] for mime in output.get("data", {})}
        if not any(mime.startswith("image/") for mime in mimes):
            continue
        meta = cell["metadata"].get("mystnb", {})
        wanted = {
            "image.alt": meta.get("image", {}).get("alt"),
            "figure.caption": meta.get("figure", {}).get("caption"),
            "figure.name": meta.get("figure", {}).get("name"),
        }
        found += [
            f"code cell {number} draws a figure without mystnb {key}"
            for key, value in wanted.items()
            if not (value or "").strip()
        ]
    return found


def untidy_code(notebook: Notebook) -> list[str]:
    found = []
    for number, cell in enumerate(code_cells(notebook), start=1):
        source = text(cell["source"])
        lines = source.strip().splitlines()
        if lines and lines[-1].rstrip().endswith(";"):
            found.append(f"code cell {number} ends with a semicolon, which nbval does not honour")
        if len(lines) > MAX_CODE_LINES:
            found.append(f"code cell {number} has {len(lines)} lines, at most {MAX_CODE_LINES}")
        if re.search(r"\b(pip|conda|mamba)3?\s+install\b", source):
            found.append(f"code cell {number} installs a package")
    return found


def wrong_opening(notebook: Notebook) -> list[str]:
    found = []
    if len(headings(notebook, 1)) != 1:
        found.append(f"expected one title, got {headings(notebook, 1)}")
    first = notebook["cells"][0]
    if first["cell_type"] != "markdown" or not text(first["source"]).startswith("# "):
        found.append("expected the title in the first cell")
    if not re.search(r"\{admonition\} You will be able to", markdown(notebook)):
        found.append("expected an admonition 'You will be able to'")
    return found


def wrong_sections(notebook: Notebook) -> list[str]:
    got = headings(notebook, 2)
    return [] if got == METHOD_HEADINGS else [f"expected sections {METHOD_HEADINGS}, got {got}"]


def unknown_citations(notebook: Notebook) -> list[str]:
    keys = [k.strip() for hit in CITATION.findall(markdown(notebook)) for k in hit.split(",")]
    return [f"{key} is not in references.bib" for key in keys if key not in bibliography_keys()]


CHECKS = [
    wrong_format,
    not_run_in_order,
    bad_outputs,
    names_this_machine,
    has_timing,
    nothing_checked,
    undescribed_images,
    untidy_code,
    wrong_opening,
    unknown_citations,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapter(path, check):
    assert check(json.loads(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapter_has_its_place(path):
    assert re.fullmatch(r"\d\d_[a-z0-9_]+", path.stem), "expected a name like 32_imtl.ipynb"
    assert f"notebooks/{path.stem}" in toc_files(), "add the chapter to book/_toc.yml"
    assert path.stat().st_size < MAX_BYTES


METHOD_CHAPTERS = [
    path for path in CHAPTERS if path.stem[:2].isdigit() and int(path.stem[:2]) in METHOD_NUMBERS
]


@pytest.mark.parametrize("path", METHOD_CHAPTERS, ids=lambda path: path.stem)
def test_method_chapter_has_the_sections_in_order(path):
    assert wrong_sections(json.loads(path.read_text(encoding="utf-8"))) == []


# --- the checks checked: a good chapter passes, and each fault is found ---------------------------


def good_chapter() -> Notebook:
    opening = "# Title\n\nOne claim {cite:p}`liu2021impartial`.\n\n"
    opening += ":::{admonition} You will be able to\n- do it\n:::"
    figure = {"image": {"alt": "a line"}, "figure": {"caption": "A line.", "name": "fig-line"}}
    v4 = nbformat.v4
    notebook = v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}},
        cells=[
            v4.new_markdown_cell(opening),
            v4.new_code_cell(
                "print(1)",
                execution_count=1,
                metadata={"tags": ["nbval-check-output"]},
                outputs=[v4.new_output("stream", name="stdout", text="1\n")],
            ),
            *(v4.new_markdown_cell(f"## {heading}") for heading in METHOD_HEADINGS),
            v4.new_code_cell(
                "plt.show()",
                execution_count=2,
                metadata={"mystnb": figure},
                outputs=[v4.new_output("display_data", data={"image/png": "iVBORw0KGgo="})],
            ),
        ],
    )
    return json.loads(nbformat.writes(notebook))


@pytest.mark.parametrize("check", [*CHECKS, wrong_sections], ids=lambda check: check.__name__)
def test_good_chapter_passes(check):
    assert check(good_chapter()) == []


def stream(name: str, content: str) -> dict[str, Any]:
    return {"output_type": "stream", "name": name, "text": content}


def shown(mime: str, content: str) -> dict[str, Any]:
    return {"output_type": "display_data", "metadata": {}, "data": {mime: content}}


ERROR = {"output_type": "error", "ename": "ValueError", "evalue": "", "traceback": []}

FAULTS = [
    (wrong_format, lambda n: n["cells"][0].pop("id")),
    (wrong_format, lambda n: n["cells"][1].update(id=n["cells"][0]["id"])),
    (wrong_format, lambda n: n["cells"][1].update(outputs=[{"output_type": "picture"}])),
    (wrong_format, lambda n: n["metadata"]["kernelspec"].update(name="julia")),
    (not_run_in_order, lambda n: n["cells"][1].update(execution_count=7)),
    (not_run_in_order, lambda n: n["cells"][1].update(execution_count=None)),
    (bad_outputs, lambda n: n["cells"][1]["outputs"].append(stream("stderr", "warning"))),
    (bad_outputs, lambda n: n["cells"][1]["outputs"].append(ERROR)),
    (bad_outputs, lambda n: n["cells"][1]["outputs"].append(shown("application/javascript", "x"))),
    (bad_outputs, lambda n: n["cells"][1]["outputs"].append(shown("text/html", "<script src>"))),
    (names_this_machine, lambda n: n["cells"][1].update(source="open('/home/ada/x.csv')")),
    (names_this_machine, lambda n: n["cells"][1]["outputs"].append(stream("stdout", "/tmp/a/b"))),
    (has_timing, lambda n: n["cells"][1]["metadata"].update(execution={"iopub.execute_input": ""})),
    (nothing_checked, lambda n: n["cells"][1]["metadata"].update(tags=[])),
    (nothing_checked, lambda n: n["cells"][1].update(outputs=[])),
    (undescribed_images, lambda n: n["cells"][-1]["metadata"]["mystnb"].pop("image")),
    (undescribed_images, lambda n: n["cells"][-1]["metadata"]["mystnb"]["figure"].pop("caption")),
    (untidy_code, lambda n: n["cells"][1].update(source="plot();")),
    (untidy_code, lambda n: n["cells"][1].update(source="x = 1\n" * 26)),
    (untidy_code, lambda n: n["cells"][1].update(source="%pip install torch")),
    (wrong_opening, lambda n: n["cells"][0].update(source="## No title")),
    (wrong_opening, lambda n: n["cells"][2].update(source="# A second title")),
    (wrong_sections, lambda n: n["cells"].pop(3)),
    (wrong_sections, lambda n: n["cells"].insert(2, n["cells"].pop(4))),
    (unknown_citations, lambda n: n["cells"][2].update(source="{cite:t}`liu2021impartial,nobody`")),
]


@pytest.mark.parametrize(("check", "break_it"), FAULTS, ids=lambda p: getattr(p, "__name__", ""))
def test_each_fault_is_found(check, break_it):
    notebook = good_chapter()
    break_it(notebook)
    assert check(notebook)


def test_comment_marker_counts_as_checked():
    notebook = good_chapter()
    notebook["cells"][1].update(source="# NBVAL_CHECK_OUTPUT\nprint(1)", metadata={})
    assert nothing_checked(notebook) == []


def test_expected_error_is_allowed():
    notebook = good_chapter()
    notebook["cells"][1]["outputs"].append(ERROR)
    notebook["cells"][1]["metadata"]["tags"].append("raises-exception")
    assert bad_outputs(notebook) == []
