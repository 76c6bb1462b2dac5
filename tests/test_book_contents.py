"""What the chapters promise as a whole: symbols explained, methods covered, figures described."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from mtl_tutorial.methods import CLASSES

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "book"
CHAPTERS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)


def cells(path: Path, kind: str) -> list[str]:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    found = [cell for cell in notebook["cells"] if cell["cell_type"] == kind]
    return ["".join(cell["source"]) for cell in found]


# --------------------------------------------------------------------------------------- symbols

# Displayed equations: {math} directives, dollar blocks, environments.
EQUATION = re.compile(
    r"^(?P<fence>`{3,}|:{3,})\{math\}[^\n]*\n(?P<directive>.*?)^(?P=fence)\s*$"
    r"|\$\$(?P<dollars>.*?)\$\$"
    r"|\\begin\{(?P<env>align|equation|gather)\*?\}(?P<body>.*?)\\end\{(?P=env)\*?\}",
    re.S | re.M,
)
# Words and operators of TeX that name nothing of ours, with what they swallow.
WORDS = re.compile(
    r"\\(?:text|mathrm|operatorname|label|tag|begin|end|color|mathbf|textbf|textit)\*?\{[^{}]*\}"
    r"|:\w+:[^\n]*"  # options of a directive
)
DECORATION = r"\\(?:hat|tilde|bar|dot|mathcal|mathbb|widetilde|widehat|overline)"
GREEK = (
    r"\\(?:var)?(?:alpha|beta|gamma|delta|epsilon|zeta|eta|theta|iota|kappa|lambda|mu|nu|xi|pi|rho|"
    r"sigma|tau|upsilon|phi|chi|psi|omega|Gamma|Delta|Theta|Lambda|Xi|Pi|Sigma|Phi|Psi|Omega|ell)"
)
SYMBOL = re.compile(
    rf"(?P<made>{DECORATION}\s*(?:\{{\s*(?:{GREEK}|[A-Za-z])\s*\}}|\s(?:{GREEK}|[A-Za-z])))"
    rf"|(?P<greek>{GREEK})(?![A-Za-z])"
    r"|\\[A-Za-z]+|\\."  # any other command
    r"|(?P<letter>[A-Za-z])"
)
# Numbers, sets and operators of all mathematics. d is also the combined gradient, and defined.
UNIVERSAL = {r"\mathbb{R}", r"\mathbb{E}", r"\pi", "e", r"\Delta"}


def symbols(tex: str) -> set[str]:
    """Letters that a formula uses, with their decoration, without indices' own decoration."""
    found = set()
    for hit in SYMBOL.finditer(WORDS.sub(" ", tex)):
        symbol = hit["made"] or hit["greek"] or hit["letter"]
        if symbol:
            name, rest = re.match(r"(\\?[A-Za-z]+)\s*(.*)", symbol, re.S).groups()
            inner = rest.strip("{} ")
            found.add(f"{name}{{{inner}}}" if inner else symbol)
    return found


def equations(markdown: str) -> list[str]:
    hits = EQUATION.finditer(markdown)
    return [hit["directive"] or hit["dollars"] or hit["body"] or "" for hit in hits]


def notation_rows() -> list[tuple[set[str], set[str]]]:
    """Rows of the notation page's tables: symbols, and chapters (two digits) they are kept to.

    The section "Letters of single chapters" names chapters in its second column. Elsewhere a symbol
    that is explained in the last column, beside the one it belongs to, counts as well.
    """
    page = (BOOK / "notation.md").read_text(encoding="utf-8")
    everywhere, _, local = page.partition("(sec-notation-local)=")
    rows = []
    for part, is_local in ((everywhere, False), (local, True)):
        for line in part.splitlines():
            if line.startswith("| $"):
                columns = line.replace(r"\|", " ").split("|")[1:-1]
                shown = columns[:1] if is_local else columns
                tex = re.findall(r"\$(.+?)\$", " ".join(shown))
                chapters = set(re.findall(r"\b\d\d\b", columns[1])) if is_local else set()
                rows.append((set().union(*map(symbols, tex)), chapters))
    return rows


# What is said in passing may use letters that it introduces itself.
PASSING = re.compile(
    r"^(?P<fence>`{3,}|:{3,})\{(?:exercise|solution|prf:proof)[^}]*\}.*?^(?P=fence)\s*$",
    re.S | re.M,
)


def unexplained(markdown: str, chapter: str) -> dict[str, str]:
    """Symbols of a chapter's equations that the notation page lacks, with their first equation."""
    rows = notation_rows()
    known = set().union(UNIVERSAL, *(s for s, only in rows if not only or chapter in only))
    found: dict[str, str] = {}
    for equation in equations(PASSING.sub("", markdown)):
        for symbol in symbols(equation) - known:
            found.setdefault(symbol, " ".join(equation.split())[:90])
    return found


@each_chapter
def test_every_symbol_of_an_equation_is_in_the_notation(path):
    found = unexplained("\n\n".join(cells(path, "markdown")), path.stem[:2])
    told = "; ".join(f"{symbol} (in {where})" for symbol, where in sorted(found.items()))
    assert not found, f"{path.stem}: add to a table of book/notation.md: {told}"


def test_unexplained_symbols_are_found():
    tex = "$$ \\hat{\\zeta}_k + g_k + \\mathrm{word} = \\argmin_Y \\tilde g $$"
    assert set(unexplained(tex, "99")) == {r"\hat{\zeta}", "Y", r"\tilde{g}"}
    fenced = "```{math}\n:label: eq-x\nY = L\n```\n"
    assert set(unexplained(fenced, "99")) == {"Y"}
    assert unexplained(":::{solution} ex-y\n$$ Y = L $$\n:::\n", "99") == {}
    assert unexplained("Inline $Y$ is not an equation, $$ D = V $$", "32") == {}
    assert set(unexplained("$$ D = V $$", "33")) == {"D", "V"}  # the letters of chapter 32 alone


# ------------------------------------------------------------------------- methods, chapters, toc


def toc_files() -> list[str]:
    toc = yaml.safe_load((BOOK / "_toc.yml").read_text(encoding="utf-8"))
    return [entry["file"] for part in toc["parts"] for entry in part["chapters"]]


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_method_has_a_reference_page(name):
    module = CLASSES[name].__module__.rsplit(".", 1)[1]
    page = BOOK / "methods" / f"{module}.md"
    wanted = f"<!-- method: {module} -->\n"
    assert page.is_file(), f"{name}: make {page.relative_to(ROOT)} with the line {wanted}"
    assert page.read_text(encoding="utf-8") == wanted


def test_every_chapter_is_in_the_table_of_contents():
    missing = {f"notebooks/{path.stem}" for path in CHAPTERS} - set(toc_files())
    assert not missing, f"add to book/_toc.yml: {sorted(missing)}"


# ------------------------------------------------------------------------------ figures and tables


@pytest.mark.parametrize("page", sorted(BOOK.glob("*.md")), ids=lambda page: page.stem)
def test_every_figure_of_a_page_is_described(page):
    text = page.read_text(encoding="utf-8")
    assert not re.findall(r"!\[\s*\]\(", text), "write what the picture shows between ![ and ]"
    for image in re.findall(r"<img\b[^>]*>", text):
        assert re.search(r'\balt="[^"]+"', image), image
    for block in re.findall(
        r"^(?:`{3,}|:{3,})\{(?:figure|image)\}.*?^(?:`{3,}|:{3,})", text, re.S | re.M
    ):
        assert re.search(r"^:alt: \S", block, re.M), block


def results_of(cell: dict) -> bool:
    """Whether a code cell shows a table of results: means over seeds with their deviation."""
    shown = [
        "".join(content)
        for output in cell["outputs"]
        for mime, content in output.get("data", {}).items()
        if mime in ("text/markdown", "text/html", "text/plain")
    ]
    shown += ["".join(output.get("text", "")) for output in cell["outputs"]]
    return any("±" in text and "|" in text for text in shown)


def typed_tables(markdown: str) -> list[str]:
    """Rows of a typed table that hold measured figures (two decimals or a deviation)."""
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    return [row for row in rows if "±" in row or len(re.findall(r"\b\d+\.\d\d\b", row)) > 1]


@each_chapter
def test_tables_of_results_are_made_from_committed_files(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    sources = ["".join(cell["source"]) for cell in code]
    makers = {"results."}  # and the chapter's functions that call it, or one another
    for source in sources * 2:
        if any(maker in source for maker in makers):
            makers |= {f"{name}(" for name in re.findall(r"^def (\w+)", source, re.M)}
    for cell, source in zip(code, sources, strict=True):
        if results_of(cell):
            made = any(maker in source for maker in makers)
            assert made, f"a table of results not made by results.*:\n{source}"
            assert any(re.search(r"load_results\(|sweep\(", text) for text in sources), source
    for text in cells(path, "markdown"):
        if "{cite" not in text:  # a paper's figures, with the paper beside them
            assert not typed_tables(text), f"figures typed into the text: {typed_tables(text)}"


def test_typed_figures_are_found():
    assert typed_tables("| equal | 90.1 ± 0.5 |") and typed_tables("| equal | 90.12 | 3.40 |")
    assert not typed_tables("| $K$ | integer | number of tasks |\n|---|---|---|")
