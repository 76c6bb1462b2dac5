"""The built pages: complete, described, and readable without a network.

Runs after `make book`; skipped where the book has not been built.
"""

from __future__ import annotations

import json
import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from mtl_tutorial.methods import CLASSES

ROOT = Path(__file__).resolve().parents[2]
HTML = ROOT / "_build" / "html"
MATHJAX = HTML / "_static" / "mathjax"
MAX_PAGE_BYTES = 1_500_000
# Elements whose address the browser fetches without a click, and the attribute that holds it.
LOADED = {
    "script": ("src",),
    "link": ("href",),
    "img": ("src", "srcset"),
    "iframe": ("src",),
    "source": ("src", "srcset"),
    "video": ("src", "poster"),
    "audio": ("src",),
    "embed": ("src",),
    "object": ("data",),
    "input": ("src",),
}
NOT_LOADED_LINKS = {"canonical", "prev", "next", "author", "license"}

pytestmark = pytest.mark.skipif(
    not (HTML / "index.html").is_file(), reason="the book is not built; run `make book`"
)
PAGES = sorted(HTML.rglob("*.html")) if HTML.is_dir() else []
PAGES = [page for page in PAGES if "_static" not in page.relative_to(HTML).parts]
each_page = pytest.mark.parametrize(
    "page", PAGES, ids=[page.relative_to(HTML).as_posix() for page in PAGES]
)


class Page(HTMLParser):
    """What a page loads, links to, shows and names."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.loads: list[str] = []
        self.links: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.ids: set[str] = set()

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.ids |= {attributes[key] for key in ("id", "name") if attributes.get(key)}
        if tag == "a" and attributes.get("href"):
            self.links.append(attributes["href"])
        if tag == "img":
            self.images.append(attributes)
        if tag == "link" and set((attributes.get("rel") or "").split()) & NOT_LOADED_LINKS:
            return
        self.loads += [attributes[key] for key in LOADED.get(tag, ()) if attributes.get(key)]


@cache
def parse(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def is_external(address: str) -> bool:
    return re.search(r"(^|[\s,])(?:https?:)?//", address.strip()) is not None


def target(page: Path, address: str) -> Path:
    """File that a relative address means, seen from a page."""
    path = unquote(urlsplit(address).path)
    return (page.parent / path).resolve() if path else page


@each_page
def test_nothing_is_loaded_from_a_network(page):
    assert [address for address in parse(page).loads if is_external(address)] == []


@each_page
def test_everything_loaded_is_there(page):
    local = [a for a in parse(page).loads if not a.startswith("data:")]
    assert [a for a in local if not target(page, a).is_file()] == []


def test_style_sheets_load_nothing_from_a_network():
    pattern = re.compile(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//")
    sheets = list((HTML / "_static").rglob("*.css"))
    assert sheets
    found = [s.name for s in sheets if pattern.search(s.read_text(encoding="utf-8"))]
    assert found == []


@each_page
def test_every_image_is_described(page):
    undescribed = [i.get("src") for i in parse(page).images if not (i.get("alt") or "").strip()]
    assert undescribed == []
    # Without a description Sphinx writes the file's own address.
    assert [i["src"] for i in parse(page).images if i["alt"].endswith((".png", ".svg"))] == []


@each_page
def test_roles_and_names_for_screen_readers(page):
    """What axe-core found in the theme's and Sphinx's own markup."""
    text = page.read_text(encoding="utf-8")
    assert '<div role="list" class="citation-list">' not in text
    assert '<summary><span class="toctree-toggle"' not in text


@each_page
def test_page_is_not_too_large(page):
    assert page.stat().st_size < MAX_PAGE_BYTES


@each_page
def test_internal_links_arrive(page):
    broken = []
    for address in parse(page).links:
        parts = urlsplit(address)
        if parts.scheme or parts.netloc:
            continue
        file = target(page, address)
        if not file.is_file():
            broken.append(address)
        elif parts.fragment and file.suffix == ".html":
            anchor = unquote(parts.fragment)
            if anchor not in parse(file).ids and anchor != "":
                broken.append(address)
    assert broken == []


def test_mathjax_is_local_and_complete():
    script = MATHJAX / "tex-chtml.js"
    assert script.stat().st_size > 1_000_000
    fonts = {font.name for font in (MATHJAX / "output/chtml/fonts/woff-v2").glob("*.woff")}
    assert {"MathJax_Main-Regular.woff", "MathJax_Math-Italic.woff"} <= fonts
    assert len(fonts) >= 20
    assert (MATHJAX / "input/tex/extensions/boldsymbol.js").is_file()
    assert "Apache License" in (MATHJAX / "NOTICE.txt").read_text(encoding="utf-8")
    size = sum(file.stat().st_size for file in MATHJAX.rglob("*") if file.is_file())
    assert size < 4_000_000, "only what the pages need, not the whole of MathJax"


def test_pages_with_formulae_load_the_local_mathjax():
    with_formulae = [p for p in PAGES if 'class="math notranslate' in p.read_text(encoding="utf-8")]
    assert with_formulae
    for page in with_formulae:
        scripts = {target(page, address) for address in parse(page).loads}
        assert (MATHJAX / "tex-chtml.js").resolve() in scripts


def test_every_page_of_the_table_of_contents_is_built():
    toc = yaml.safe_load((ROOT / "book/_toc.yml").read_text(encoding="utf-8"))
    files = [toc["root"], *(c["file"] for part in toc["parts"] for c in part["chapters"])]
    assert [file for file in files if not (HTML / f"{file}.html").is_file()] == []


REPOSITORY = "https://github.com/one-network-many-losses/mtl_tutorial"
CHAPTERS = sorted(path.stem for path in (HTML / "notebooks").glob("*.html"))


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_chapter_can_be_downloaded_and_opened_on_colab(chapter):
    page = HTML / "notebooks" / f"{chapter}.html"
    links = parse(page).links
    notebook = target(
        page, next(a for a in links if a.endswith(f"_sources/notebooks/{chapter}.ipynb"))
    )
    # As committed; the build only gave cells without an output the same content.
    built, ours = (
        json.loads(path.read_text(encoding="utf-8"))["cells"]
        for path in (notebook, ROOT / "notebooks" / f"{chapter}.ipynb")
    )
    assert [cell["source"] for cell in built] == [cell["source"] for cell in ours]
    path = f"blob/main/notebooks/{chapter}.ipynb"
    colab = REPOSITORY.replace("https://github.com", "https://colab.research.google.com/github")
    assert f"{colab}/{path}" in links


@cache
def search_index() -> dict:
    text = (HTML / "searchindex.js").read_text(encoding="utf-8")
    return json.loads(text.removeprefix("Search.setIndex(").removesuffix(")"))


def pages_with(words: str) -> set[str]:
    """Pages that a search for all of these words finds."""
    english = pytest.importorskip("sphinx.search.en").SearchEnglish({})
    index = search_index()
    found = set(index["docnames"])
    for word in filter(english.word_filter, english.split(words.lower())):
        pages: set[int] = set()
        for part in ("terms", "titleterms"):
            hit = index[part].get(english.stem(word), [])
            pages |= {hit} if isinstance(hit, int) else set(hit)
        found &= {index["docnames"][page] for page in pages}
    return found


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_search_finds_a_method_by_name_paper_and_author(name):
    cls = CLASSES[name]
    page = f"book/methods/{cls.__module__.rsplit('.', 1)[1]}"
    author = re.split(r" et al\.| and |,", cls.paper.split("; ")[-1])[0]
    for words in (name, cls.title, cls.paper, author):
        assert page in pages_with(words), words
    assert pages_with("no page has the word xylophonist") == set()


def test_search_index_knows_the_pages():
    index = (HTML / "searchindex.js").read_text(encoding="utf-8")
    assert index.startswith("Search.setIndex(")
    assert '"book/notation"' in index
    assert (HTML / "search.html").is_file()
