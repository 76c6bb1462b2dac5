"""Sphinx extension: document every module of a package folder without listing the modules by hand.

On a Markdown page the line

    <!-- modules: mtl_tutorial.methods equal imtl -->

is replaced by a table of the modules in that folder (name, first sentence of the docstring) and one
section per module with its documentation. Modules named after the package come first, in that
order; the others follow alphabetically. So a method that is added to the package appears in the
book. Files whose name starts with an underscore are left out, and sub-packages have marks of their
own.

Docstrings are written to be read in the source. Two habits of theirs mean something else to Sphinx
and are translated here: a formula set off by a blank line and four spaces becomes a literal block,
and the bar of an absolute value stays a bar.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sphinx.errors import ExtensionError

if TYPE_CHECKING:
    from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[2]
MARK = re.compile(r"^<!-- modules: (?P<package>[\w.]+)(?P<first>[ \w]*?) *-->$", re.MULTILINE)
LONGEST_TITLE = 40
LIST_ITEM = re.compile(r"\s*([*+-]|\d+[.)])\s")
CODE_SPAN = re.compile(r"(``.+?``|`[^`]+`)")


def first_sentence(path: Path) -> str:
    """First line of a module's docstring.

    Raises:
        ExtensionError: if the module has no docstring.
    """
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    if not text:
        raise ExtensionError(f"expected a docstring in {path.name}, got none; say what it is for")
    return text.splitlines()[0]


def title(module: str, sentence: str) -> str:
    """Heading: what stands before the colon of the first sentence, with the module's name."""
    name, colon, _ = sentence.partition(":")
    if colon and len(name) <= LONGEST_TITLE:
        return f"{name} (`{module}`)"
    return f"`{module}`"


def modules(package: str, first: list[str]) -> list[str]:
    """Names of the modules of a package, those in ``first`` leading.

    Raises:
        ExtensionError: if the package does not exist or lacks a module named in ``first``.
    """
    folder = ROOT.joinpath(*package.split("."))
    names = sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))
    unknown = [name for name in first if name not in names]
    if unknown or not names:
        raise ExtensionError(
            f"expected modules {' '.join(first)} in {package}, got {' '.join(names) or 'none'}; "
            f"correct the line '<!-- modules: {package} ... -->'"
        )
    return first + [name for name in names if name not in first]


def render(package: str, first: list[str]) -> str:
    """Markdown for the modules of a package: the table, then one section for each."""
    rows = ["| module | in one sentence |", "|---|---|"]
    sections = []
    for name in modules(package, first):
        sentence = first_sentence(ROOT.joinpath(*package.split("."), f"{name}.py"))
        cell = sentence.replace("|", r"\|")
        rows.append(f"| {{py:mod}}`{name} <{package}.{name}>` | {cell} |")
        directive = f"```{{eval-rst}}\n.. automodule:: {package}.{name}\n```"
        sections.append(f"### {title(name, sentence)}\n\n{directive}")
    return "\n\n".join(["\n".join(rows), *sections])


def fill_marks(app: Sphinx, docname: str, source: list[str]) -> None:
    """Replace the marks of a page while Sphinx reads it."""
    source[0] = MARK.sub(lambda m: render(m["package"], m["first"].split()), source[0])


def plain_formulae(lines: list[str]) -> list[str]:
    """Translate the formulae of a docstring into what Sphinx shows unchanged."""
    result: list[str] = []
    text = ""  # the last line that was not empty, outside formulae
    in_formula = False
    for line in lines:
        indent = len(line) - len(line.lstrip())
        deeper = indent >= len(text) - len(text.lstrip()) + 4
        if in_formula and line.strip() and not deeper:
            in_formula = False
        # Behind a list's marker or a section's name, deeper lines belong to the item or section.
        after_prose = bool(text) and not LIST_ITEM.match(text) and bool(result) and not result[-1]
        if not in_formula and line.strip() and deeper and after_prose:
            result += [" " * (len(text) - len(text.lstrip())) + ".. code-block:: none", ""]
            in_formula = True
        if in_formula:
            result.append(line)
            continue
        if line.strip():
            text = line
        parts = CODE_SPAN.split(line)
        parts[::2] = [part.replace("|", "\\|") for part in parts[::2]]
        result.append("".join(parts))
    return result


def translate_docstring(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Apply `plain_formulae` in place, as autodoc expects."""
    lines[:] = plain_formulae(lines)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register both translations."""
    app.connect("source-read", fill_marks)
    # Before napoleon (500), which moves the sections of a docstring about.
    app.connect("autodoc-process-docstring", translate_docstring, priority=100)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
