"""Sphinx extension: one reference page per method file, made from the file when the book is built.

The page ``book/methods/imtl.md`` holds the single line

    <!-- method: imtl -->

and shows what a reader needs to take ``mtl_tutorial/methods/imtl.py`` away: the file as shipped,
what it needs beside it, where to put it, a loop around it that a test runs, the licence, and the
chapter that derives it. Nothing of this is written down twice, so it cannot drift.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from sphinx.errors import ExtensionError

from mtl_tutorial.methods import CLASSES

if TYPE_CHECKING:
    from sphinx.application import Sphinx

    from mtl_tutorial.gradients import Method

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "mtl_tutorial"
PAGES = ROOT / "book" / "methods"
MARK = re.compile(r"^<!-- method: (\w+) -->$", re.MULTILINE)
LICENCE_LINE = "# From mtl_tutorial, (c) 2026 The One Network, Many Losses authors, MIT License"

# Chapters, by file; one that is not written yet is not linked.
CHAPTERS = {
    "01_many_losses": ["equal"],
    "20_loss_weights": ["uncertainty", "dwa", "rlw", "geometric", "scale_invariant"],
    "21_imtl_l": ["imtl"],
    "22_slaw_famo": ["slaw", "famo"],
    "30_min_norm": ["mgda"],
    "31_pcgrad_graddrop_gradvac": ["pcgrad", "graddrop", "gradvac"],
    "32_imtl": ["imtl", "gradnorm"],
    "33_cagrad": ["cagrad"],
    "34_nash_fairgrad": ["nash_mtl", "fairgrad"],
    "35_aligned_mtl": ["aligned_mtl"],
    "36_upgrad_dualproj_config": ["upgrad", "dualproj", "config"],
    "40_excess_mtl": ["excess_mtl", "group_dro"],
    "50_when_to_step": ["independent", "cross_learning"],
    "70_unlearning": ["ngdiff", "gen_lr"],
}

# Two tasks on random data: short, and every method can run it.
SETUP = """\
import torch
from torch import nn

from balance.methods.{module} import {cls}

torch.manual_seed(0)
trunk, heads = nn.Linear(8, 16), nn.ModuleList([nn.Linear(16, 1), nn.Linear(16, 1)])
model = nn.ModuleList([trunk, heads])
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
method = {cls}()
"""
LOOPS = {
    "backward": """
for _ in range(10):
    x, y = torch.randn(32, 8), torch.randn(32, 2)  # your batch
    z = trunk(x).relu()
    losses = torch.stack([(h(z)[:, 0] - t).square().mean() for h, t in zip(heads, y.T)])
    optimizer.zero_grad()
    method.backward(losses)  # in place of losses.sum().backward()
    optimizer.step()
""",
    "step": """
for _ in range(10):
    x, y = torch.randn(32, 8), torch.randn(32, 2)  # your batch

    def closure():
        z = trunk(x).relu()
        return torch.stack([(h(z)[:, 0] - t).square().mean() for h, t in zip(heads, y.T)])

    method.step(closure, optimizer)  # zeroes the gradients, differentiates, steps
""",
    "learning rate": """
for _ in range(10):
    x, y = torch.randn(32, 8), torch.randn(32, 2)  # your batch

    def loss():
        z = trunk(x).relu()
        return sum((h(z)[:, 0] - t).square().mean() for h, t in zip(heads, y.T))

    optimizer.zero_grad()
    loss().backward()
    method.update(loss, optimizer, model)  # between backward and step
    optimizer.step()
""",
}


def modules() -> list[str]:
    """Names of all method files, sorted."""
    return sorted(path.stem for path in (PACKAGE / "methods").glob("[!_]*.py"))


def neighbours(module: str) -> list[str]:
    """Files of the package that a method's file imports when it is imported."""
    tree = ast.parse((PACKAGE / "methods" / f"{module}.py").read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.level]
    if any(node.level != 2 or node.module is None for node in imports):
        raise ExtensionError(
            f"expected imports of the form 'from ..name' in {module}.py; see there"
        )
    return sorted(f"{node.module}.py" for node in imports)


def classes(module: str) -> list[type[Method]]:
    """The methods that a file defines, in the order of the package's list."""
    return [cls for cls in CLASSES.values() if cls.__module__.endswith(f".methods.{module}")]


def loop(module: str, cls: type[Method] | None = None) -> str:
    """A script that trains with a method, from the folder that holds ``balance``.

    Args:
        module: name of the file.
        cls: a method of that file; its first one by default.
    """
    found = classes(module)
    if not found:  # gen_lr.py: a learning rate, no way to combine gradients
        return SETUP.format(module=module, cls="GeNLR") + LOOPS["learning rate"]
    cls = cls or found[0]
    steps = any("step" in vars(base) for base in cls.__mro__ if base.__name__ != "Method")
    return SETUP.format(module=module, cls=cls.__name__) + LOOPS["step" if steps else "backward"]


def written_chapters() -> set[str]:
    """Chapters in the table of contents, by file."""
    toc = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text(encoding="utf-8"))
    files = [entry["file"] for part in toc["parts"] for entry in part["chapters"]]
    return {Path(file).name for file in files if file.startswith("notebooks/")}


def tree(module: str) -> str:
    """Where the copied files go."""
    lines = ["your_project/", "    train.py", "    balance/          # or any other name"]
    lines += [f"        {name}" for name in neighbours(module)]
    return "\n".join([*lines, "        methods/", f"            {module}.py"])


def table(found: list[type[Method]]) -> str:
    """The methods of a file: name, paper and price."""
    rows = ["| name | method | paper | looks at | backward passes | memory | state |"]
    rows.append("|---|---|---|---|---|---|---|")
    looks = {"losses": "losses", "gram": "Gram matrix", "rows": "gradients"}
    for cls in found:
        cells = [f"`{cls.name}`", cls.title, cls.paper, looks[cls.sees]]
        rows.append("| " + " | ".join([*cells, cls.passes, cls.memory, cls.state]) + " |")
    return "\n".join(rows)


def page(module: str) -> str:
    """A method file's reference page, in Markdown.

    Raises:
        ExtensionError: there is no such file.
    """
    if module not in modules():
        raise ExtensionError(
            f"expected a file of mtl_tutorial/methods, got {module!r}; correct the line "
            f"'<!-- method: {module} -->' or remove the page"
        )
    found, beside = classes(module), neighbours(module)
    titles = [cls.title for cls in found] or ["GeN learning rate"]
    name = " and ".join(filter(None, [", ".join(titles[:-1]), titles[-1]]))
    chapters = [c for c, covered in CHAPTERS.items() if module in covered]
    chapters = [f"{{doc}}`../../notebooks/{c}`" for c in chapters if c in written_chapters()]
    links = [f"{{download}}`{module}.py <../../mtl_tutorial/methods/{module}.py>`"]
    links += [f"{{download}}`{file} <../../mtl_tutorial/{file}>`" for file in beside]
    needs = " and ".join(f"`{file}`" for file in beside)
    parts = [
        f"# {name}",
        (f"Derived and measured in {', '.join(chapters)}. " if chapters else "")
        + f"Settings and every deviation from the paper: {{py:mod}}`mtl_tutorial.methods.{module}`"
        + ("; other people's code beside it: {doc}`../deviations`." if found else "."),
        table(found) if found else "",
        "## Take it away",
        f"`{module}.py` needs torch and "
        + (f"two files of this package, {needs}" if len(beside) == 2 else needs or "nothing else")
        + ("; `solvers.py` needs NumPy too" if "solvers.py" in beside else "")
        + f". Download {', '.join(links)} and put {'them' if beside else 'it'} here:",
        f"```text\n{tree(module)}\n```",
        "No `__init__.py` is needed. "
        + (
            f"To have the files side by side instead, change `from ..` to `from ` in the imports "
            f"of `{module}.py`."
            if beside
            else "It may as well lie beside `train.py`."
        ),
        "MIT licence: do with it what you like; {download}`LICENSE <../../LICENSE>` stays with the "
        "copy, or at its head this line:",
        f"```python\n{LICENCE_LINE}\n```",
        "## A loop around it",
        f"```python\n{loop(module)}```",
        "## The file",
        f"```{{literalinclude}} ../../mtl_tutorial/methods/{module}.py\n:language: python\n```\n",
    ]
    return "\n\n".join(filter(None, parts))


def fill_marks(app: Sphinx, docname: str, source: list[str]) -> None:
    """Replace the mark of a page while Sphinx reads it."""
    source[0] = MARK.sub(lambda m: page(m[1]), source[0])


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the replacement."""
    app.connect("source-read", fill_marks)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
