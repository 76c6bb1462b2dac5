"""Sphinx extension: serve MathJax from the built book instead of from a content network.

The Python package `sphinx-mathjax-offline` carries MathJax 3.2.2. Loading that package as an
extension would copy all of its 24 MB; a page needs one script, the fonts and the TeX extensions
that MathJax fetches on demand (``\\boldsymbol``, ``\\color``, ...), 2 MB together. This extension
copies those at build time, so no third-party file is kept in the repository.
"""

from __future__ import annotations

import shutil
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sphinx.errors import ExtensionError

if TYPE_CHECKING:
    from sphinx.application import Sphinx

PACKAGE = "sphinx-mathjax-offline"
# Folders keep their place relative to the script: MathJax finds its fonts from its own address.
WANTED = ("tex-chtml.js", "output/chtml/fonts/woff-v2", "input/tex/extensions")
NOTICE = """MathJax 3.2.2, Copyright (c) The MathJax Consortium.
Licensed under the Apache License, Version 2.0: https://www.apache.org/licenses/LICENSE-2.0
Source: https://github.com/mathjax/MathJax. Copied unchanged by the build of this book.
"""


def mathjax_source() -> Path:
    """Folder of the installed package that holds MathJax's files.

    Returns:
        The folder that contains ``tex-chtml.js``.

    Raises:
        ExtensionError: if the package is missing or does not contain what the pages need.
    """
    try:
        distribution = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError as error:
        raise ExtensionError(
            f"expected the package {PACKAGE} (MathJax for reading without a network), got nothing; "
            f"do pip install -e '.[book]'"
        ) from error
    # The package's folder has a hyphen in its name, so it cannot be imported by a statement.
    source = Path(str(distribution.locate_file(f"{PACKAGE}/static/mathjax")))
    missing = [name for name in WANTED if not (source / name).exists()]
    if missing:
        raise ExtensionError(
            f"expected {', '.join(WANTED)} in {PACKAGE} {distribution.version}, "
            f"got no {', '.join(missing)}; do pip install {PACKAGE}==0.0.2"
        )
    return source


def copy_mathjax(app: Sphinx, exception: Exception | None) -> None:
    """Copy the wanted files into ``_static/mathjax`` after a successful HTML build."""
    if exception is not None or app.builder.format != "html":
        return
    source = mathjax_source()
    target = Path(app.outdir) / "_static" / "mathjax"
    for name in WANTED:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, dirs_exist_ok=True)
        else:
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, target / name)
    (target / "NOTICE.txt").write_text(NOTICE, encoding="utf-8")


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the copying; a missing package stops the build here, before any page is read."""
    mathjax_source()
    app.connect("build-finished", copy_mathjax)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
