"""The book's own pages: table of contents, bibliography, notation, tools."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "book"
PAGES = sorted(BOOK.glob("*.md"))
EXECUTE = BOOK / "execute.py"


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def parts() -> list[dict]:
    return yaml.safe_load(read(BOOK / "_toc.yml"))["parts"]


def toc_files() -> list[str]:
    root = yaml.safe_load(read(BOOK / "_toc.yml"))["root"]
    return [root, *(chapter["file"] for part in parts() for chapter in part["chapters"])]


def test_every_entry_of_the_table_of_contents_exists_once():
    files = toc_files()
    assert len(files) == len(set(files))
    missing = [f for f in files if not any((ROOT / f"{f}{s}").is_file() for s in (".md", ".ipynb"))]
    assert missing == []


def test_every_page_is_in_the_table_of_contents():
    assert {f"book/{page.stem}" for page in PAGES} <= set(toc_files())


def test_chapters_are_in_the_order_of_their_numbers():
    chapters = [entry for entry in toc_files() if entry.startswith("notebooks/")]
    assert chapters == sorted(chapters)


def bib_entries() -> list[tuple[str, str]]:
    """Key and body of each entry; an entry ends with a brace on a line of its own."""
    source = read(BOOK / "references.bib")
    return re.findall(r"^@\w+\{([^,\s]+),\n(.*?)^\}$", source, flags=re.MULTILINE | re.DOTALL)


def test_bibliography_is_read_completely():
    assert len(bib_entries()) == read(BOOK / "references.bib").count("@") > 30


def test_bibliography_keys_are_unique():
    keys = [key for key, _ in bib_entries()]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize(("key", "body"), bib_entries(), ids=[key for key, _ in bib_entries()])
def test_entry_is_complete(key, body):
    fields = dict(re.findall(r"^\s*(\w+)\s*=\s*\{(.*)\},?$", body, flags=re.MULTILINE))
    assert all(fields.get(name) for name in ("author", "title", "year"))
    assert re.fullmatch(r"(19|20)\d\d", fields["year"])
    assert fields["year"] in key, "a key names the year that its entry gives"
    assert body.count("{") == body.count("}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_citations_of_a_page_are_known(page):
    known = {key for key, _ in bib_entries()}
    for hit in re.findall(r"\{cite(?::[a-z]+)?\}`([^`]+)`", read(page)):
        assert {key.strip() for key in hit.split(",")} <= known


def test_every_entry_is_cited_on_the_references_page():
    page = read(BOOK / "references.md")
    assert [key for key, _ in bib_entries() if f"`{key}`" not in page] == []


# The symbols that the chapters and the docstrings share.
SYMBOLS = [
    "K",
    r"\theta",
    r"\phi_k",
    "z",
    "L_k",
    "g_k",
    "n_k",
    "u_k",
    "J",
    "G",
    "C",
    r"\lambda_1",
    r"\sigma_r",
    r"\kappa",
    r"\eta",
    r"\alpha",
    "d",
    "w",
    "s_k",
    r"\Delta m",
]


@pytest.mark.parametrize("symbol", SYMBOLS)
def test_symbol_is_defined_in_a_table_of_the_notation(symbol):
    rows = [line.split("|")[1] for line in read(BOOK / "notation.md").splitlines() if "|" in line]
    assert any(re.search(rf"\$(?:.*\s)?{re.escape(symbol)}(?![A-Za-z_])", row) for row in rows)


def test_macros_used_on_the_pages_are_defined():
    config = yaml.safe_load(read(ROOT / "_config.yml"))
    macros = config["sphinx"]["config"]["mathjax3_config"]["tex"]["macros"]
    text = "".join(read(page) for page in PAGES)
    assert {"R", "norm", "inner", "T"} <= set(macros)
    for name in ("R", "norm", "inner", "T"):
        assert re.search(rf"\\{name}\b", text)


def test_modules_on_the_api_page_can_be_imported():
    page = BOOK / "api.md"
    if not page.is_file():
        pytest.skip("book/api.md does not exist yet")
    modules = re.findall(r"automodule:: (\S+)", read(page))
    assert modules
    for module in modules:
        importlib.import_module(module)


@pytest.fixture
def local_mathjax(monkeypatch):
    pytest.importorskip("sphinx", reason="the extension belongs to the book's tools")
    monkeypatch.syspath_prepend(BOOK / "_ext")
    return importlib.import_module("local_mathjax")


def test_missing_mathjax_package_is_named(local_mathjax, monkeypatch):
    monkeypatch.setattr(local_mathjax, "PACKAGE", "no-such-package-for-formulae")
    with pytest.raises(local_mathjax.ExtensionError, match=r"pip install -e '.\[book\]'"):
        local_mathjax.mathjax_source()


def test_incomplete_mathjax_package_is_named(local_mathjax, monkeypatch):
    pytest.importorskip("sphinx_book_theme", reason="the book's tools are not installed")
    monkeypatch.setattr(local_mathjax, "WANTED", ("tex-chtml.js", "no-such-file.js"))
    with pytest.raises(local_mathjax.ExtensionError, match=r"got no no-such-file\.js"):
        local_mathjax.mathjax_source()


def run_execute(*arguments: str, budget: str = "") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"MTL_TUTORIAL_BUDGET": budget}
    command = [sys.executable, str(EXECUTE), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, check=False, timeout=120
    )


def chapter(path: Path, *sources: str) -> Path:
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    cells[0].metadata["execution"] = {"iopub.execute_input": "2000-01-01T00:00:00"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def test_executing_twice_changes_nothing_and_passes_the_budget(tmp_path):
    pytest.importorskip("ipykernel", reason="executing a chapter needs a kernel")
    path = chapter(
        tmp_path / "a.ipynb",
        "import os\nprint(os.environ['MTL_TUTORIAL_BUDGET'], os.environ['OMP_NUM_THREADS'])",
        "import mtl_tutorial",
    )
    first = run_execute(str(path), budget="tiny")
    assert first.returncode == 0, first.stderr
    assert re.fullmatch(r"a\.ipynb  \d+\.\d s\n", first.stdout)
    once = path.read_bytes()
    assert run_execute(str(path), budget="tiny").returncode == 0
    assert path.read_bytes() == once

    notebook = nbformat.read(path, as_version=4)
    assert [cell.execution_count for cell in notebook.cells] == [1, 2]
    assert notebook.cells[0].outputs[0].text.split()[0] == "tiny"
    assert all("execution" not in cell.metadata for cell in notebook.cells)
    assert notebook.metadata.kernelspec.name == "python3"
    assert "version" not in notebook.metadata.language_info


def test_chapter_that_raises_keeps_its_file(tmp_path):
    pytest.importorskip("ipykernel", reason="executing a chapter needs a kernel")
    path = chapter(tmp_path / "b.ipynb", "1 / 0")
    before = path.read_bytes()
    result = run_execute(str(path))
    assert result.returncode == 1
    assert "ZeroDivisionError" in result.stderr
    assert path.read_bytes() == before


def test_missing_chapter_is_named(tmp_path):
    result = run_execute(str(tmp_path / "no.ipynb"))
    assert result.returncode == 2
    assert "no.ipynb" in result.stderr


@pytest.fixture
def package_pages(monkeypatch):
    pytest.importorskip("sphinx", reason="the extension belongs to the book's tools")
    monkeypatch.syspath_prepend(BOOK / "_ext")
    return importlib.import_module("package_pages")


def test_every_module_of_the_package_has_a_section(package_pages):
    text = read(BOOK / "api.md") + read(BOOK / "api_methods.md")
    source = [text]
    package_pages.fill_marks(None, "book/api", source)
    packages = ("mtl_tutorial", "mtl_tutorial.methods", "mtl_tutorial.benchmarks")
    for package in packages:
        for path in ROOT.joinpath(*package.split(".")).glob("[!_]*.py"):
            assert f"automodule:: {package}.{path.stem}\n" in source[0]


def test_mark_with_an_unknown_module_is_refused(package_pages):
    source = ["<!-- modules: mtl_tutorial.methods imtl imtk -->"]
    with pytest.raises(package_pages.ExtensionError, match=r"expected modules imtl imtk"):
        package_pages.fill_marks(None, "book/api", source)


def test_section_titles(package_pages):
    assert package_pages.title("imtl", "IMTL: impartial learning.") == "IMTL (`imtl`)"
    assert package_pages.title("names", "Help for a mistyped name.") == "`names`"


def test_formulae_of_a_docstring_are_shown_unchanged(package_pages):
    lines = [
        "The step is",
        "",
        "    d = |x| * e^-1,",
        "",
        "    y = *z*",
        "",
        "where |x| is not ``|y|``.",
        "",
        "* an item",
        "",
        "      with a paragraph of its own",
        "",
        "Args:",
        "    x: a number.",
    ]
    assert package_pages.plain_formulae(lines) == [
        "The step is",
        "",
        ".. code-block:: none",
        "",
        "    d = |x| * e^-1,",
        "",
        "    y = *z*",
        "",
        r"where \|x\| is not ``|y|``.",
        "",
        "* an item",
        "",
        "      with a paragraph of its own",
        "",
        "Args:",
        "    x: a number.",
    ]


@pytest.fixture
def link_page(monkeypatch):
    monkeypatch.syspath_prepend(BOOK / "_ext")
    return importlib.import_module("link_page")


def test_external_addresses_are_listed_with_who_names_them(link_page):
    found = link_page.links()
    assert found["https://github.com/SimplexLab/TorchJD"] == ["deviations.md"]
    assert any(names == ["references.bib"] for names in found.values())
    assert all(re.fullmatch(r"https?://[^\s<>()\[\]]+[\w/]", address) for address in found)
    source = [read(BOOK / "links.md")]
    link_page.fill_mark(None, "book/links", source)
    assert source[0].count("\n| <http") == len(found) > 20


def test_addresses_end_where_the_sentence_goes_on(link_page):
    text = "See (https://a.org/x_y), [b](https://b.org/z) and `https://c.org/d`. <https://e.org>."
    assert link_page.ADDRESS.findall(text) == [
        *("https://a.org/x_y", "https://b.org/z", "https://c.org/d", "https://e.org")
    ]


def test_fold_marks_are_named_and_the_bibliography_has_no_wrong_role(link_page, tmp_path):
    class App:
        outdir = tmp_path
        builder = type("Builder", (), {"format": "html"})

    page = tmp_path / "x.html"
    text = f"<details>{link_page.NAMELESS}></span></summary></details>{link_page.CALLED_LIST}</div>"
    page.write_text(text, encoding="utf-8")
    link_page.for_screen_readers(App, None)
    text = page.read_text(encoding="utf-8")
    assert '<summary aria-label="' in text
    assert 'role="list"' not in text
